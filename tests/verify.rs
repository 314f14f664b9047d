//! `wgrad verify` as its user sees it: what is random can be run again, alone.

use serde_json::{Value, json};
use std::process::{Command, Output};
use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::verify::drawn;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wgrad"));
    command.arg("verify").args(arguments);
    command
}

fn verify(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn gpu() -> Gpu {
    Gpu::open(&Choice::Best)
        .unwrap_or_else(|e| panic!("these tests need an adapter: {e}; {NO_ADAPTER_HINT}"))
}

#[test]
fn one_random_geometry_runs_alone() {
    let gpu = gpu();
    let name = &gpu.report().name;
    let expected: Vec<String> = drawn(gpu.report(), 7, 3)
        .iter()
        .map(|case| format!("{}: {}", case.kernel, case.variant))
        .collect();
    let run = || {
        let output = verify(&["--device", name, "--seed", "7", "--only", "3", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let report = run();
    let found: Vec<String> = report["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| {
            let text = |key: &str| case[key].as_str().unwrap().to_string();
            format!("{}: {}", text("kernel"), text("variant"))
        })
        .collect();
    assert_eq!(found, expected);
    // The same inputs too, so that the errors are the same.
    assert_eq!(run(), report);
}

/// Mesa's software adapter takes the size of its subgroups from the environment: a few random
/// geometries on each size that the subgroup family takes and this machine does not prefer.
#[test]
fn subgroups_of_every_size_agree_with_the_twin() {
    let gpu = gpu();
    let name = &gpu.report().name;
    if !name.contains("llvmpipe") {
        println!("skipped: {name} has subgroups of one size, only Mesa's llvmpipe takes others");
        return;
    }
    for lanes in [4, 16] {
        for index in ["2", "3"] {
            let output = command(&["--device", "llvmpipe", "--only", index, "--json"])
                .env("LP_NATIVE_VECTOR_WIDTH", (32 * lanes).to_string())
                .output()
                .unwrap();
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(report["adapter"]["subgroup_size"], json!([lanes, lanes]));
            assert_eq!(report["passed"], true, "{lanes} lanes: {report:#}");
            let cases = report["cases"].as_array().unwrap().iter();
            let variants = cases.filter_map(|case| case["variant"].as_str());
            assert!(variants.into_iter().any(|v| v.starts_with("subgroup")));
        }
    }
}

#[test]
fn what_cannot_be_run_alone_is_refused() {
    for (arguments, part) in [
        (&["--only", "3", "--random", "5"][..], "cannot be used with"),
        (
            &["--only", "3", "--device", "cpu"],
            "expected an adapter for --only",
        ),
        (&["--random", "-1"], "invalid"),
        (&["--every", "0"], "invalid"),
        (&["--every", "2", "--only", "3"], "cannot be used with"),
    ] {
        let output = verify(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(
            line.contains(part) && line.trim().lines().count() == 1,
            "{line}"
        );
    }
}
