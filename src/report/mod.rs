//! Measurements, for people and for machines: [`mod@bench`] for kernels and steps against the adapter's
//! own peak, [`profile`] for where the time of a training step goes; pictures: [`plot`]s as SVG,
//! [`sheet`] of data,
//! [`mod@preview`] of what a training step is shown; pages: [`page`] of a run, with [`results`] on its
//! test images and the command that [`mod@repeat`]s it, [`mod@compare`] of several; and [`tensorboard`] for
//! those who watch by that.

pub mod bench;
pub mod compare;
pub mod page;
mod picture;
pub mod plot;
pub mod preview;
pub mod profile;
pub mod repeat;
pub mod results;
pub mod sheet;
pub mod tensorboard;

/// A name that somebody gave, as one line of at most `most` characters: what would break a line, end a
/// file's text or turn the direction of what follows is replaced, what is too long ends in an ellipsis.
pub(crate) fn plain(name: &str, most: usize) -> String {
    let odd = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{fffe}' | '\u{ffff}')
    };
    let mut line: String = name
        .chars()
        .map(|c| if odd(c) { '\u{fffd}' } else { c })
        .collect();
    if line.chars().count() > most {
        line = line.chars().take(most.saturating_sub(1)).collect();
        line.push('…');
    }
    line
}
