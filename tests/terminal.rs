//! What a training shows in a real pseudo-terminal, as a terminal emulator sees it.

#![cfg(unix)]

mod common;

use assert_cmd::cargo::cargo_bin;
use pty_process::Size;
use pty_process::blocking::{Command, Pty, open};
use std::fs;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const ROWS: u16 = 24;

/// A program in a terminal, and the terminal's screen.
struct Session {
    terminal: Pty,
    child: Child,
    output: Receiver<Vec<u8>>,
    screen: vt100::Parser,
    /// All that it wrote.
    bytes: Vec<u8>,
}

impl Session {
    fn start(
        folder: &Path,
        columns: u16,
        environment: &[(&str, &str)],
        arguments: &str,
    ) -> Session {
        let (terminal, slave) = open().unwrap();
        terminal.resize(Size::new(ROWS, columns)).unwrap();
        let child = Command::new(cargo_bin("wgrad"))
            .current_dir(folder)
            .env_remove("RUST_LOG")
            .env_remove("COLUMNS")
            .env_remove("NO_COLOR")
            .env("TERM", "xterm-256color")
            .envs(environment.iter().copied())
            .args(arguments.split_whitespace())
            .spawn(slave)
            .unwrap();
        let duplicate = terminal.as_fd().try_clone_to_owned().unwrap();
        let mut reader = fs::File::from(duplicate);
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Ends with an error when the program has ended.
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Session {
            terminal,
            child,
            output,
            screen: vt100::Parser::new(rows(ROWS), rows(columns), 1000),
            bytes: Vec::new(),
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// Reads until the screen is as expected.
    fn until(&mut self, expected: impl Fn(&vt100::Screen) -> bool) {
        let start = Instant::now();
        while !expected(self.screen.screen()) {
            assert!(
                start.elapsed() < Duration::from_secs(120),
                "the screen stays:\n{}",
                self.screen.screen().contents()
            );
            if let Ok(new) = self.output.recv_timeout(Duration::from_millis(100)) {
                self.screen.process(&new);
                self.bytes.extend(new);
            }
        }
    }

    /// Reads to the end; the exit code.
    fn end(&mut self) -> Option<i32> {
        while let Ok(new) = self.output.recv_timeout(Duration::from_secs(120)) {
            self.screen.process(&new);
            self.bytes.extend(new);
        }
        self.child.wait().unwrap().code()
    }

    fn resize(&mut self, columns: u16) {
        self.terminal.resize(Size::new(ROWS, columns)).unwrap();
        let screen = self.screen.screen_mut();
        screen.set_size(rows(ROWS), rows(columns));
    }
}

fn rows(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).unwrap()
}

fn lines(screen: &vt100::Screen) -> Vec<String> {
    let (_, columns) = screen.size();
    screen
        .rows(0, columns.get())
        .map(|row| row.trim_end().to_string())
        .collect()
}

/// The five lines of the block where they all are there, right above the cursor.
fn block(screen: &vt100::Screen) -> Option<Vec<String>> {
    let (row, column) = screen.cursor_position();
    let first = usize::from(row).checked_sub(5)?;
    let block = lines(screen)[first..usize::from(row)].to_vec();
    let labels = ["epoch ", "all epochs", "loss ", "accuracy ", "test "];
    let is_whole = labels
        .iter()
        .zip(&block)
        .all(|(label, line)| line.starts_with(label));
    (is_whole && column == 0).then_some(block)
}

/// A model and data with epochs that take a while.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    common::write_model_and_data(folder.path());
    let (pixels, labels) = common::images(20_000, 3);
    let file = |name: &str| folder.path().join("shapes").join(name);
    fs::write(
        file("train-images-idx3-ubyte"),
        common::idx(&[20_000, 8, 6], &pixels),
    )
    .unwrap();
    fs::write(
        file("train-labels-idx1-ubyte"),
        common::idx(&[20_000], &labels),
    )
    .unwrap();
    folder
}

const TRAIN: &str = "train --model small.toml --data shapes --device cpu --lr 1e-5 --out run";

/// One block that stays below the lines of the epochs, in a terminal of any width, until Ctrl-C ends it.
#[test]
fn a_training_is_one_block_below_its_epochs() {
    for columns in [80, 40, 25, 200] {
        let folder = folder();
        let arguments = format!("{TRAIN} --epochs 500");
        let mut session = Session::start(folder.path(), columns, &[], &arguments);
        // Three epochs, and something measured.
        session.until(|screen| {
            let is_third = |block: Vec<String>| {
                block[0].starts_with("epoch 3/500") && block[1].contains("ETA")
            };
            block(screen).is_some_and(|b| !b[1].contains("ETA —") && is_third(b))
        });
        let screen = session.screen.screen();
        let all = lines(screen);
        let shown = block(screen).unwrap();
        for line in &shown {
            assert!(line.chars().count() <= 80, "{columns}: {line}");
        }
        // Nothing of it was left behind, and none of its lines is broken.
        let count = |what: &str| all.iter().filter(|line| line.starts_with(what)).count();
        assert_eq!((count("all epochs"), count("accuracy")), (1, 1), "{all:#?}");
        assert_eq!(count("loss "), 1, "{all:#?}");
        let (row, _) = screen.cursor_position();
        assert!(
            (row - 5..row).all(|row| !screen.row_wrapped(row)),
            "{all:#?}"
        );
        let done = all.iter().filter(|line| line.starts_with("epoch ")).count();
        assert_eq!(done, 3, "two epochs and the block: {all:#?}");
        let curve = |line: &String| line.chars().any(|c| ('▁'..='█').contains(&c));
        let bar = |line: &String| line.contains('━') || line.contains('─');
        if columns >= 40 {
            assert!(bar(&shown[0]) && bar(&shown[1]), "{shown:#?}");
            assert!(curve(&shown[2]), "{shown:#?}");
        }
        if columns >= 80 {
            assert!(
                shown[0].contains(" %") && shown[1].contains(" %"),
                "{shown:#?}"
            );
            assert!(shown[4].ends_with(" %"), "{shown:#?}");
        }

        session.terminal.write_all(b"\x03").unwrap();
        assert_eq!(session.end(), Some(130));
        let screen = session.screen.screen();
        let all = lines(screen);
        assert!(block(screen).is_none(), "{all:#?}");
        let count = |what: &str| all.iter().filter(|line| line.starts_with(what)).count();
        assert_eq!((count("all epochs"), count("accuracy")), (0, 0), "{all:#?}");
        assert_eq!(count("interrupted in epoch"), 1, "{all:#?}");
        assert!(!screen.hide_cursor() && !session.text().contains("\x1b[?25l"));
        assert_eq!(screen.fgcolor(), vt100::Color::Default);
    }
}

#[test]
fn a_terminal_may_get_another_size() {
    let folder = folder();
    let arguments = format!("{TRAIN} --epochs 500");
    let mut session = Session::start(folder.path(), 100, &[], &arguments);
    for columns in [100, 50, 30, 120] {
        session.resize(columns);
        let epoch = |screen: &vt100::Screen| {
            block(screen).map(|b| b[0].split_whitespace().nth(1).unwrap().to_string())
        };
        session.until(|screen| epoch(screen).is_some());
        let before = epoch(session.screen.screen());
        session.until(|screen| epoch(screen).is_some_and(|now| Some(now) != before));
        let screen = session.screen.screen();
        for line in block(screen).unwrap() {
            assert!(
                line.chars().count() < usize::from(columns),
                "{columns}: {line}"
            );
        }
        let all = lines(screen);
        assert_eq!(
            all.iter()
                .filter(|line| line.starts_with("accuracy"))
                .count(),
            1,
            "{columns}: {all:#?}"
        );
    }
    session.terminal.write_all(b"\x03").unwrap();
    assert_eq!(session.end(), Some(130));
}

#[test]
fn colours_can_be_refused() {
    let folder = folder();
    for (environment, colours, escapes) in [
        (vec![], true, true),
        (vec![("NO_COLOR", "")], true, true),
        (vec![("NO_COLOR", "1")], false, true),
        (vec![("TERM", "dumb")], false, false),
    ] {
        let arguments = format!("{TRAIN} --epochs 2 --no-cache");
        let mut session = Session::start(folder.path(), 80, &environment, &arguments);
        assert_eq!(session.end(), Some(0), "{}", session.text());
        let text = session.text();
        // A code of colour ends with m; those that move the cursor and clear lines do not.
        let coded: Vec<&str> = text.split("\x1b[").skip(1).collect();
        let is_colour = |code: &&str| {
            code.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';')
                .starts_with('m')
        };
        assert_eq!(
            coded.iter().any(is_colour),
            colours,
            "{environment:?}: {text}"
        );
        assert_eq!(!coded.is_empty(), escapes, "{environment:?}: {text}");
        fs::remove_dir_all(folder.path().join("run")).unwrap();
    }
}

#[test]
fn quiet_is_results_alone() {
    let folder = folder();
    for quiet in ["-q", "--quiet"] {
        let arguments = format!("{TRAIN} --epochs 1 {quiet}");
        let mut session = Session::start(folder.path(), 80, &[], &arguments);
        assert_eq!(session.end(), Some(0));
        let text = session.text();
        let labels: Vec<&str> = text
            .lines()
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        assert_eq!(labels, ["result", "weights", "run"], "{text}");
        assert!(!text.contains('\x1b'), "{text:?}");
        fs::remove_dir_all(folder.path().join("run")).unwrap();
    }
    Session::start(folder.path(), 80, &[], &format!("{TRAIN} --epochs 1 -q")).end();
    let mut session = Session::start(folder.path(), 80, &[], "eval run --device cpu -q");
    assert_eq!(session.end(), Some(0));
    let text = session.text();
    assert!(
        text.starts_with("loss  ") && text.contains("recall"),
        "{text}"
    );
    assert!(!text.contains('\x1b'), "{text:?}");
    let mut session = Session::start(folder.path(), 80, &[], "--quiet train --data nowhere");
    assert_eq!(session.end(), Some(2));
    assert!(
        session.text().starts_with("error: nowhere"),
        "{}",
        session.text()
    );
}

#[test]
fn an_error_stands_where_the_block_was() {
    let folder = folder();
    let arguments =
        "train --model small.toml --data shapes --device cpu --optimizer sgd --lr 1e30 --out run";
    let mut session = Session::start(folder.path(), 80, &[], arguments);
    assert_eq!(session.end(), Some(1));
    let all = lines(session.screen.screen());
    let last = all.iter().rposition(|line| !line.is_empty()).unwrap();
    let error = all
        .iter()
        .position(|line| line.starts_with("error: "))
        .unwrap();
    // It may take two rows.
    assert!(last - error < 3, "{all:#?}");
    assert!(
        !all.iter().any(|line| line.starts_with("all epochs")),
        "{all:#?}"
    );
}
