//! What the loops of a matrix product are made of, counted in AMD's assembly.

/// Instructions by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Count {
    pub multiply_adds: usize,
    /// All of the vector unit, multiply-adds among them. Plain additions do not count: those in a loop over
    /// terms make the bias's gradient, in the first row of tiles alone, and the others branch around them.
    pub vector: usize,
    /// Reads of workgroup memory.
    pub reads: usize,
    /// Conditional ones.
    pub branches: usize,
}

impl Count {
    fn of<'a>(instructions: impl IntoIterator<Item = &'a str>) -> Count {
        let mut count = Count::default();
        for instruction in instructions {
            count.multiply_adds += usize::from(is_multiply_add(instruction));
            let addition =
                instruction.starts_with("v_add_f32") || instruction.starts_with("v_dual_add_f32");
            count.vector += usize::from(instruction.starts_with("v_") && !addition);
            let read = instruction.starts_with("ds_read") || instruction.starts_with("ds_load");
            count.reads += usize::from(read);
            count.branches += usize::from(instruction.starts_with("s_cbranch"));
        }
        count
    }

    /// The share of multiply-adds in the vector instructions.
    pub fn share(&self) -> f64 {
        self.multiply_adds as f64 / self.vector.max(1) as f64
    }

    pub fn reads_per_multiply_add(&self) -> f64 {
        self.reads as f64 / self.multiply_adds.max(1) as f64
    }
}

fn is_multiply_add(instruction: &str) -> bool {
    let starts = ["v_fma", "v_mac", "v_pk_fma", "v_dual_fmac", "v_mad_f32"];
    starts.iter().any(|start| instruction.starts_with(start)) && instruction.contains("f32")
}

/// The loop over blocks of terms.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loops {
    /// A turn of it: the loads and stores of a block, and the multiply-adds of its unrolled terms. The
    /// whole kernel where all terms lie in one block.
    pub block: Count,
    /// In it, from the first multiply-add to the last.
    pub hot: Count,
    /// Whether there is a loop at all.
    pub turns: bool,
}

impl Loops {
    /// Of the loop that has the most multiply-adds; of several around each other, the innermost.
    pub fn of(assembly: &str) -> Loops {
        let mut blocks: Vec<(&str, Vec<&str>)> = vec![("", Vec::new())];
        for line in assembly.lines().map(str::trim) {
            match line.strip_suffix(':').filter(|name| name.starts_with("BB")) {
                Some(name) => blocks.push((name, Vec::new())),
                // Two instructions may go out together.
                None => blocks
                    .last_mut()
                    .into_iter()
                    .for_each(|(_, lines)| lines.extend(line.split(" :: "))),
            }
        }
        let place = |name: &str| blocks.iter().position(|(other, _)| *other == name);
        let lines = |begin: usize, end: usize| {
            blocks[begin..=end]
                .iter()
                .flat_map(|(_, lines)| lines.iter().copied())
        };
        let mut best = (0, blocks.len() - 1);
        let rank = |&(begin, end): &(usize, usize)| {
            (
                Count::of(lines(begin, end)).multiply_adds,
                usize::MAX - lines(begin, end).count(),
            )
        };
        let mut turns = false;
        for (end, (_, instructions)) in blocks.iter().enumerate() {
            let back = instructions
                .iter()
                .filter(|line| line.starts_with("s_") && line.contains("branch"));
            let back = back.filter_map(|line| place(line.split_whitespace().nth(1)?));
            for begin in back.filter(|begin| *begin <= end) {
                if !turns || rank(&(begin, end)) > rank(&best) {
                    (best, turns) = ((begin, end), true);
                }
            }
        }
        let block: Vec<&str> = lines(best.0, best.1).collect();
        let first = block.iter().position(|line| is_multiply_add(line));
        let last = block.iter().rposition(|line| is_multiply_add(line));
        let hot = match (first, last) {
            (Some(first), Some(last)) => Count::of(block[first..=last].iter().copied()),
            _ => Count::default(),
        };
        Loops {
            block: Count::of(block),
            hot,
            turns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRODUCT: &str = "
BB0:
\tv_mov_b32_e32 v0, 0                     ; 7e000280
BB1:
\ts_cmp_eq_i32 s8, 0                      ; bf008008
\ts_cbranch_scc1 BB3                      ; bf850001
\tv_add_nc_u32_e32 v1, 4, v1              ; 4a020284
\tbuffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen ; e0380000
\tds_write_b128 v3, v[4:7]                ; db7c0000
\ts_barrier                               ; bf8a0000
\tds_read_b128 v[8:11], v3                ; dbfc0000
\tv_fma_f32 v0, v4, v8, v0                ; d54b0000
\tv_fmac_f32_e32 v0, v5, v9               ; 56000000
\ts_and_saveexec_b64 s[14:15], s[16:17]   ; be8e2410
\ts_cbranch_execz BB2                     ; bf880000
\tv_add_f32_e32 v2, v2, v8                ; 06040302
BB2:
\ts_barrier                               ; bf8a0000
\ts_branch BB1                            ; bf820000
BB3:
\tv_mul_f32_e32 v0, v0, v1                ; 10000300
\ts_endpgm                                ; bf810000
";

    #[test]
    fn the_loop_over_blocks_and_its_unrolled_terms_are_told_apart() {
        let loops = Loops::of(PRODUCT);
        assert!(loops.turns);
        let (block, hot) = (loops.block, loops.hot);
        assert_eq!(
            [
                block.multiply_adds,
                block.vector,
                block.reads,
                block.branches
            ],
            [2, 3, 1, 2]
        );
        assert_eq!(
            [hot.multiply_adds, hot.vector, hot.reads, hot.branches],
            [2, 2, 0, 0]
        );
        assert_eq!(hot.share(), 1.0);
    }

    #[test]
    fn what_stands_between_multiply_adds_is_seen() {
        let worse = PRODUCT.replace(
            "\tv_fmac_f32_e32 v0, v5, v9",
            "\ts_cbranch_vccz BB2\n\tv_min_u32_e32 v9, 15, v9\n\tv_fmac_f32_e32 v0, v5, v9",
        );
        let hot = Loops::of(&worse).hot;
        assert_eq!([hot.multiply_adds, hot.vector, hot.branches], [2, 3, 1]);
    }

    #[test]
    fn two_instructions_that_go_out_together_are_two() {
        let dual = "BB0:\n\tv_dual_fmac_f32 v0, v1, v2 :: v_dual_mov_b32 v3, v4\n\ts_endpgm\n";
        let loops = Loops::of(dual);
        assert!(!loops.turns);
        assert_eq!([loops.block.multiply_adds, loops.block.vector], [1, 2]);
    }

    #[test]
    fn of_loops_in_each_other_the_inner_counts() {
        let outer = PRODUCT.replace("BB3:\n", "BB3:\n\ts_cbranch_scc0 BB0\n");
        assert_eq!(Loops::of(&outer).block, Loops::of(PRODUCT).block);
    }
}
