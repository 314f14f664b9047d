//! How training images are changed at random before the network sees them.
//!
//! Pure numbers without a device: what they mean is `shaders/augment.wgsl` and its twin;
//! `docs/augmentation.md` has formulas and sources.

use serde::{Deserialize, Serialize};

/// What is drawn for each sample of a batch, on the device. The default changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Largest shift to either side, as a share of height and width, from 0 to 1.
    pub shift: f32,
    /// Largest rotation to either side about the centre, in degrees, from 0 to 180.
    pub rotate: f32,
    /// Scaling about the centre by a factor from 1 − `scale` to 1 + `scale`, from 0 to 0.9.
    pub scale: f32,
    /// Largest horizontal shear to either side, in degrees, from 0 to 60.
    pub shear: f32,
    /// What lies beyond the image's border.
    pub border: Border,
    /// Mirroring left to right.
    pub flip: Flip,
    /// Pad-and-crop: a shift by up to that many whole pixels to either side, which copies pixels as they
    /// are; from 0 to 256.
    pub crop: u32,
    /// Random-resized-crop: smallest and largest share of the area that is enlarged to the whole image,
    /// above 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resized_crop: Option<[f32; 2]>,
    /// Random erasing: probability that a rectangle becomes the training set's mean, from 0 to 1.
    pub erase: f32,
    /// Smallest and largest share of the area that the rectangle takes, above 0 to 1.
    pub erase_size: [f32; 2],
    /// Cut-out: side in pixels of a square anywhere on the image that becomes the training set's mean;
    /// from 0 to 4096.
    pub cut_out: u32,
    /// Every byte is multiplied by a factor from 1 − `brightness` to 1 + `brightness`, from 0 to 1.
    pub brightness: f32,
    /// The distance to the training set's mean grey, by a factor from 1 − `contrast` to 1 + `contrast`, from
    /// 0 to 1.
    pub contrast: f32,
    /// The distance to the pixel's own grey, by a factor from 1 − `saturation` to 1 + `saturation`, from 0
    /// to 1.
    pub saturation: f32,
    /// Elastic distortion: largest displacement of a pixel along either axis, in pixels, from 0 to 64.
    pub elastic: f32,
    /// Cells along either axis of the coarse grid whose displacements are drawn, from 1 to 16.
    pub elastic_grid: u32,
    /// Mix-up: α of the Beta distribution that the share of another image is drawn from, from 0 (off) to 10.
    pub mix_up: f32,
    /// Cut-mix: α of the Beta distribution that the area of another image is drawn from, from 0 (off) to 10.
    pub cut_mix: f32,
}

impl Default for Augment {
    fn default() -> Augment {
        Augment {
            shift: 0.0,
            rotate: 0.0,
            scale: 0.0,
            shear: 0.0,
            border: Border::Zero,
            flip: Flip::Never,
            crop: 0,
            resized_crop: None,
            erase: 0.0,
            // As in torchvision's RandomErasing.
            erase_size: [0.02, 0.33],
            cut_out: 0,
            brightness: 0.0,
            contrast: 0.0,
            saturation: 0.0,
            elastic: 0.0,
            elastic_grid: 4,
            mix_up: 0.0,
            cut_mix: 0.0,
        }
    }
}

/// What lies beyond an image's border.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Border {
    /// The byte 0.
    #[default]
    Zero,
    /// The image mirrored at its outermost pixels, which are not repeated.
    Reflect,
}

/// When an image is mirrored left to right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Flip {
    /// Not at all.
    #[default]
    #[serde(rename = "none")]
    Never,
    /// Half of the time.
    Random,
    /// Every other epoch; which half of the images begins is drawn (Jordan, 2024, arXiv 2404.00498).
    Alternating,
}

impl Augment {
    /// Whether nothing is changed.
    pub fn is_none(&self) -> bool {
        !self.changes_images() && !self.mixes()
    }

    /// Whether each image is changed by itself, by other than mixing it with another one.
    pub fn changes_images(&self) -> bool {
        self.warps()
            || self.recolours()
            || self.erases()
            || self.flip != Flip::Never
            || self.crop > 0
    }

    /// Whether images are mixed with one another.
    pub fn mixes(&self) -> bool {
        self.mix_up > 0.0 || self.cut_mix > 0.0
    }

    /// Whether pixels come from between pixels.
    pub fn warps(&self) -> bool {
        let largest = [
            self.shift,
            self.rotate,
            self.scale,
            self.shear,
            self.elastic,
        ];
        largest.iter().any(|x| *x > 0.0) || self.resized_crop.is_some()
    }

    /// Whether bytes are changed.
    pub fn recolours(&self) -> bool {
        self.brightness > 0.0 || self.contrast > 0.0 || self.saturation > 0.0
    }

    /// Whether a part of an image is blotted out.
    pub fn erases(&self) -> bool {
        self.erase > 0.0 || self.cut_out > 0
    }

    /// # Errors
    /// The first key whose value is out of range, and what was expected and found.
    pub fn check(&self) -> std::result::Result<(), (&'static str, String)> {
        let numbers = [
            ("shift", self.shift, 1.0),
            ("rotate", self.rotate, 180.0),
            ("scale", self.scale, 0.9),
            ("shear", self.shear, 60.0),
            ("erase", self.erase, 1.0),
            ("brightness", self.brightness, 1.0),
            ("contrast", self.contrast, 1.0),
            ("saturation", self.saturation, 1.0),
            ("elastic", self.elastic, 64.0),
            ("mix_up", self.mix_up, 10.0),
            ("cut_mix", self.cut_mix, 10.0),
        ];
        for (key, found, most) in numbers {
            if !(0.0..=most).contains(&found) {
                let what = format!("expected `{key}` from 0 to {most}, found {found}");
                return Err((key, what));
            }
        }
        let counts = [
            ("crop", self.crop, [0, 256]),
            ("cut_out", self.cut_out, [0, 4096]),
            ("elastic_grid", self.elastic_grid, [1, 16]),
        ];
        for (key, found, [least, most]) in counts {
            if !(least..=most).contains(&found) {
                let what = format!(
                    "expected `{key}` as a whole number from {least} to {most}, found {found}"
                );
                return Err((key, what));
            }
        }
        let shares = [
            ("resized_crop", self.resized_crop),
            ("erase_size", Some(self.erase_size)),
        ];
        for (key, found) in shares {
            if let Some([least, most]) = found
                && !(least > 0.0 && least <= most && most <= 1.0)
            {
                let what = format!(
                    "expected `{key}` as [smallest, largest] share of the area, above 0 to 1, found [{least}, {most}]"
                );
                return Err((key, what));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_changes_nothing_and_every_key_something() {
        assert!(Augment::default().is_none());
        assert_eq!(Augment::default().check(), Ok(()));
        for key in [
            "shift = 0.1",
            "rotate = 10",
            "scale = 0.1",
            "shear = 5",
            "flip = 'random'",
            "flip = 'alternating'",
            "crop = 2",
            "resized_crop = [0.5, 1]",
            "erase = 0.5",
            "cut_out = 8",
            "brightness = 0.2",
            "contrast = 0.2",
            "saturation = 0.2",
            "elastic = 1.5",
        ] {
            let augment: Augment = toml::from_str(key).unwrap();
            assert!(augment.changes_images() && !augment.is_none(), "{key}");
            assert_eq!(augment.check(), Ok(()), "{key}");
        }
        for key in ["mix_up = 0.2", "cut_mix = 1"] {
            let augment: Augment = toml::from_str(key).unwrap();
            assert!(!augment.changes_images() && !augment.is_none(), "{key}");
        }
        for key in [
            "border = 'reflect'",
            "elastic_grid = 3",
            "erase_size = [0.1, 0.2]",
        ] {
            let augment: Augment = toml::from_str(key).unwrap();
            assert!(augment.is_none(), "{key}");
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let augment = Augment {
            rotate: 12.5,
            flip: Flip::Alternating,
            border: Border::Reflect,
            resized_crop: Some([0.25, 1.0]),
            ..Augment::default()
        };
        let text = serde_json::to_string(&augment).unwrap();
        assert_eq!(serde_json::from_str::<Augment>(&text).unwrap(), augment);
        let none = serde_json::to_string(&Augment::default()).unwrap();
        assert!(none.contains(r#""flip":"none""#), "{none}");
    }
}
