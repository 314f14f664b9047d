//! What a shell and `man` get: completions and manual pages.

#![cfg(unix)]

use assert_cmd::cargo::cargo_bin;
use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

fn wgrad(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("wgrad"))
        .args(arguments)
        .output()
        .unwrap()
}

/// Gives `input` to a program; `None` where there is no such program.
fn pipe(program: &str, arguments: &[&str], input: &[u8]) -> Option<Output> {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        println!("skipped: no {program} here");
        return None;
    };
    child.stdin.take().unwrap().write_all(input).unwrap();
    Some(child.wait_with_output().unwrap())
}

#[test]
fn shells_complete_commands_and_flags() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = wgrad(&["completions", shell]);
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        let script = String::from_utf8(output.stdout).unwrap();
        for word in ["wgrad", "train", "tensorboard", "quiet"] {
            assert!(script.contains(word), "no {word} for {shell}");
        }
        if let "bash" | "zsh" | "fish" = shell {
            let checked = pipe(shell, &["-n"], script.as_bytes());
            assert!(checked.is_none_or(|c| c.status.success()), "{shell}");
        }
    }
    // Bash completes with it.
    let script = String::from_utf8(wgrad(&["completions", "bash"]).stdout).unwrap();
    let line = "COMP_WORDS=(wgrad train --tens); COMP_CWORD=2; _wgrad wgrad --tens train; echo \"${COMPREPLY[@]}\"";
    if let Some(output) = pipe("bash", &[], format!("{script}\n{line}\n").as_bytes()) {
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            "--tensorboard",
            "{output:?}"
        );
    }
    let output = wgrad(&["completions", "csh"]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        message.lines().count() == 1 && message.contains("bash, elvish, fish"),
        "{message}"
    );
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man");
    let output = wgrad(&["man", pages.to_str().unwrap()]);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    let help = String::from_utf8(wgrad(&["--help"]).stdout).unwrap();
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands = commands.take_while(|line| !line.is_empty());
    let names = commands.filter_map(|line| line.strip_prefix("  ").filter(|l| !l.starts_with(' ')));
    let names: Vec<&str> = names.filter_map(|line| line.split(' ').next()).collect();
    assert!(
        names.contains(&"train") && names.contains(&"man"),
        "{names:?}"
    );
    let files = names
        .iter()
        .filter(|name| **name != "help")
        .map(|name| format!("wgrad-{name}.1"));
    for file in files.chain(["wgrad.1".into()]) {
        let page = fs::read(pages.join(&file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert!(page.is_ascii(), "{file}");
        // With all warnings; a page is as wide as the terminal.
        if let Some(output) = pipe(
            "groff",
            &["-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=78n"],
            &page,
        ) {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                output.stderr.is_empty(),
                "{file}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            assert!(
                text.contains("NAME") && text.contains("SYNOPSIS"),
                "{file}: {text}"
            );
        }
    }
    assert_eq!(
        fs::read_dir(&pages).unwrap().count(),
        names.iter().filter(|n| **n != "help").count() + 1
    );
    let printed = wgrad(&["man"]).stdout;
    let written = fs::read(pages.join("wgrad.1")).unwrap();
    assert_eq!(printed.trim_ascii_end(), written.trim_ascii_end());
}
