//! Parameter groups: how each parameter is trained, by its role, its place and its name.

use super::recipe::Groups;
use super::{Model, Op, Role};
use crate::error::{Error, Result};

/// What a parameter makes of the learning rate and the weight decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factors {
    /// 0 where it is frozen.
    pub lr: f32,
    /// On the weight decay.
    pub decay: f32,
}

impl Groups {
    /// The factors of the parameters of each layer of `model`, in order.
    ///
    /// # Errors
    /// [`Error::Usage`] for a factor below 0 or not finite, for a name to freeze that nothing has, and when
    /// nothing is left to be trained.
    pub fn factors(&self, model: &Model) -> Result<Vec<Vec<Factors>>> {
        for (key, factor) in [
            ("bias_lr", self.bias_lr),
            ("head_lr", self.head_lr),
            ("bias_decay", self.bias_decay),
        ] {
            // Written so that NaN is refused.
            if !(0.0..=f32::MAX).contains(&factor) {
                return Err(Error::Usage(format!(
                    "expected {key} to be a number of at least 0, found {factor}; leave it out for 1"
                )));
            }
        }
        let head = model.layers.iter().rposition(|l| l.op.product().is_some());
        for pattern in &self.freeze {
            let parameters = || model.layers.iter().flat_map(|l| &l.parameters);
            let layers = model.layers.iter().filter(|l| !l.parameters.is_empty());
            if !parameters().any(|p| matches(pattern, &p.name))
                && !layers.clone().any(|l| matches(pattern, &l.name))
            {
                let names: Vec<_> = parameters().map(|p| p.name.as_str()).collect();
                return Err(Error::Usage(format!(
                    "expected the name of a parameter or a layer to freeze, with * for anything, found '{pattern}', which is none of {}",
                    names.join(", ")
                )));
            }
        }
        let layers = model.layers.iter().enumerate();
        let factors: Vec<Vec<Factors>> = layers
            .map(|(i, layer)| {
                let parameters = layer.parameters.iter();
                let of = parameters.map(|parameter| {
                    let frozen =
                        |p: &String| matches(p, &parameter.name) || matches(p, &layer.name);
                    // What a normalisation scales by is no weight.
                    let weight = parameter.role == Role::Weight && layer.op.product().is_some();
                    Factors {
                        lr: match (weight, Some(i) == head) {
                            _ if self.freeze.iter().any(frozen) => 0.0,
                            (true, true) => self.head_lr,
                            (true, false) => 1.0,
                            (false, _) => self.bias_lr,
                        },
                        decay: if weight { 1.0 } else { self.bias_decay },
                    }
                });
                of.collect()
            })
            .collect();
        let mut all = factors.iter().flatten().peekable();
        if all.peek().is_some() && all.all(|factors| factors.lr == 0.0) {
            return Err(Error::Usage(format!(
                "expected a parameter that is trained, found all of them frozen by {}; freeze fewer",
                self.freeze.join(", ")
            )));
        }
        Ok(factors)
    }
}

impl Op {
    /// Whether Muon takes its weight: a convolution that is not grouped.
    pub fn is_for_muon(&self) -> bool {
        matches!(self, Op::Conv2d(geometry) if geometry.groups == 1)
    }
}

/// Whether `name` is `pattern`, in which a `*` stands for anything.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    name.strip_prefix(start).is_some_and(|name| {
        let mut ends = name.char_indices().map(|(i, _)| i).chain([name.len()]);
        ends.any(|i| matches(rest, &name[i..]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::load;

    fn model(name: &str) -> Model {
        let definition = load(name).unwrap();
        definition
            .resolve(definition.input, definition.classes)
            .unwrap()
    }

    #[test]
    fn a_star_stands_for_anything() {
        for (pattern, name) in [
            ("conv2d1.weight", "conv2d1.weight"),
            ("*", "conv2d1.weight"),
            ("*", ""),
            ("conv2d1*", "conv2d1"),
            ("*.bias", "conv2d1.bias"),
            ("st*.co*.w*t", "stage1.conv2.weight"),
            ("*é*", "né"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("conv2d1", "conv2d1.weight"),
            ("conv2d1*", "conv2d2.weight"),
            ("*.bias", "conv2d1.bias2"),
            ("", "conv2d1"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    /// In cnn-bn a convolution without bias is followed by a batch-norm, and the end is dense.
    #[test]
    fn factors_follow_role_place_and_name() {
        let model = model("cnn-bn");
        let groups = Groups {
            bias_lr: 64.0,
            head_lr: 0.5,
            bias_decay: 0.25,
            freeze: vec!["stage1.*".into(), "*2.conv2d2.weight".into()],
        };
        let factors = groups.factors(&model).unwrap();
        let of = |name: &str| {
            let names = model.layers.iter().flat_map(|l| &l.parameters);
            let at = names.zip(factors.iter().flatten());
            let mut found = at
                .filter(|(p, _)| p.name == name)
                .map(|(_, f)| [f.lr, f.decay]);
            found.next().unwrap_or_else(|| panic!("{name}"))
        };
        assert_eq!(of("stage1.conv2d1.weight"), [0.0, 1.0]);
        assert_eq!(of("stage1.batch_norm2.bias"), [0.0, 0.25]);
        assert_eq!(of("stage2.conv2d2.weight"), [0.0, 1.0]);
        assert_eq!(of("stage2.conv2d1.weight"), [1.0, 1.0]);
        assert_eq!(of("stage2.batch_norm2.weight"), [64.0, 0.25]);
        assert_eq!(of("stage2.batch_norm2.bias"), [64.0, 0.25]);
        assert_eq!(of("dense1.weight"), [0.5, 1.0]);
        assert_eq!(of("dense1.bias"), [64.0, 0.25]);
    }

    #[test]
    fn a_name_that_nothing_has_is_an_error_with_the_names() {
        let freeze = |pattern: &str| Groups {
            freeze: vec![pattern.into()],
            ..Groups::default()
        };
        let model = model("lenet5");
        let error = freeze("stage1.*").factors(&model).unwrap_err();
        let line = error.to_string();
        assert!(line.contains("'stage1.*'") && line.contains("conv2d1.weight, conv2d1.bias, "));
        assert_eq!((error.exit_code(), line.lines().count()), (2, 1));
        for head_lr in [-1.0, f32::NAN, f32::INFINITY] {
            let groups = Groups {
                head_lr,
                ..Groups::default()
            };
            let error = groups.factors(&model).unwrap_err().to_string();
            assert!(error.contains("expected head_lr"), "{error}");
        }
        let error = freeze("*").factors(&model).unwrap_err().to_string();
        assert!(error.contains("all of them frozen by *"), "{error}");
    }
}
