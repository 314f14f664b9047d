//! Random numbers without a state: a word follows from what it is for, on the CPU and on the GPU alike.
//!
//! Source: Jarzynski and Olano (2020), "Hash Functions for GPU Rendering", Journal of Computer Graphics
//! Techniques 9(3).

/// Four random words for four words: a bijection of all 2¹²⁸, of which each output depends on each input.
pub fn pcg4d(words: [u32; 4]) -> [u32; 4] {
    let mut v = words.map(|w| w.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    mix(&mut v);
    v = v.map(|w| w ^ (w >> 16));
    mix(&mut v);
    v
}

fn mix([x, y, z, w]: &mut [u32; 4]) {
    *x = x.wrapping_add(y.wrapping_mul(*w));
    *y = y.wrapping_add(z.wrapping_mul(*x));
    *z = z.wrapping_add(x.wrapping_mul(*y));
    *w = w.wrapping_add(y.wrapping_mul(*z));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By another program (Python's whole numbers, modulo 2³²), from the listing in the paper.
    #[test]
    fn known_values() {
        let zeros = [0x0f02_f829, 0x2d56_8769, 0x32b0_c43b, 0xd325_48ea];
        assert_eq!(pcg4d([0; 4]), zeros);
        let counted = [0x3622_cd16, 0xf114_71d8, 0xe110_9b3f, 0x02b9_4c2f];
        assert_eq!(pcg4d([1, 2, 3, 4]), counted);
        let large = [0xb78c_af9c, 0xf217_1329, 0x127e_816b, 0x2710_595e];
        assert_eq!(pcg4d([u32::MAX, u32::MAX, u32::MAX, 7]), large);
    }
}
