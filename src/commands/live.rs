//! A few lines at the bottom of a terminal that are drawn anew where they are.
//!
//! A frame is one write, and overwrites the one before it, so that nothing flickers. Between frames the
//! cursor rests at the beginning of the line below: whatever ends the program, there is nothing to restore.

use super::quiet;
use console::{Term, is_dumb};
use std::fmt::Write;

/// Columns that are used of a wider terminal.
const COLUMNS: usize = 80;

pub(super) struct Block {
    terminal: Term,
    /// The columns of each line on the screen.
    drawn: Vec<usize>,
    /// The frame on the screen.
    frame: String,
    pub colours: bool,
}

impl Block {
    /// On standard error, where that is a terminal which can move its cursor and somebody wants to see it.
    pub fn new() -> Option<Block> {
        let terminal = Term::buffered_stderr();
        if quiet() || !terminal.is_term() || is_dumb() {
            return None;
        }
        // On Windows this question turns on what understands the codes.
        if cfg!(windows) && !terminal.features().colors_supported() {
            return None;
        }
        // https://no-color.org
        let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Some(Block {
            terminal,
            drawn: Vec::new(),
            frame: String::new(),
            colours,
        })
    }

    /// How long a line may be now: a terminal may get another size at any time.
    pub fn columns(&self) -> usize {
        let (_, columns) = self.terminal.size();
        // Some terminals go on to the next line as soon as the last column is full.
        usize::from(columns).saturating_sub(1).clamp(1, COLUMNS)
    }

    /// Replaces what is there by `lines`, the last of which are left out where the terminal is too low. That
    /// nobody can see them is no error.
    pub fn draw(&mut self, lines: &[String]) {
        let (rows, columns) = self.terminal.size();
        let columns = usize::from(columns).max(1);
        let shown = &lines[..lines.len().min(usize::from(rows).saturating_sub(1))];
        let mut frame = String::new();
        for line in shown {
            let _ = writeln!(frame, "{line}\x1b[K");
        }
        let widths: Vec<usize> = shown
            .iter()
            .map(|line| console::measure_text_width(line))
            .collect();
        let wrapped = |width: &usize| width.div_ceil(columns).max(1);
        let up: usize = self.drawn.iter().map(wrapped).sum();
        // A terminal that has become narrower has broken the lines, and shows each of them as several.
        if frame == self.frame && up == self.drawn.len() {
            return;
        }
        let mut text = match up {
            0 => String::from("\r"),
            up => format!("\r\x1b[{up}A"),
        };
        text += &frame;
        text += "\x1b[J";
        let _ = self.terminal.write_str(&text);
        let _ = self.terminal.flush();
        (self.drawn, self.frame) = (widths, frame);
    }

    /// Takes it from the screen.
    pub fn clear(&mut self) {
        if !self.drawn.is_empty() {
            self.draw(&[]);
        }
    }
}
