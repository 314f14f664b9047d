//! `wgrad devices`: the adapters of this machine.

use super::device::cpu_notice;
use super::{say, say_json, say_wrapped, table};
use crate::cli::DevicesArgs;
use indicatif::{BinaryBytes, HumanCount};
use serde_json::json;
use wgrad::engine::CpuEngine;
use wgrad::gpu::{AdapterReport, Choice, Gpu, NO_ADAPTER_HINT, adapters};
use wgrad::kernels::Prices;
use wgrad::verify::Fingerprint;
use wgrad::{Error, Result, tune};

pub fn run(args: &DevicesArgs) -> Result<()> {
    let adapters = adapters()?;
    let notice = cpu_notice(&adapters);
    let cpu = CpuEngine::device();
    if args.json {
        let mut devices: Vec<_> = adapters
            .iter()
            .enumerate()
            .map(|(i, report)| {
                let mut value = json!(report);
                value["prices"] = json!(prices(report));
                value["number"] = json!(i + 1);
                value["auto"] = json!(i == 0 && notice.is_none());
                // An adapter that does not open is listed all the same, with the reason.
                match fingerprint(i + 1) {
                    Ok(fingerprint) => value["arithmetic"] = json!(fingerprint),
                    Err(e) => {
                        value["arithmetic"] = json!(null);
                        value["arithmetic_error"] = json!(e.to_string());
                    }
                }
                value
            })
            .collect();
        devices.push(json!({ "name": cpu, "kind": "CPU", "auto": notice.is_some() }));
        say_json(&json!(devices))?;
    } else {
        let taken = |auto| {
            if auto {
                ", what --device auto takes"
            } else {
                ""
            }
        };
        for (i, report) in adapters.iter().enumerate() {
            let auto = taken(i == 0 && notice.is_none());
            say_wrapped(&format!("{}  {}{auto}", i + 1, report.name))?;
            say(&table(&[], rows(report), 2))?;
        }
        say(&format!("cpu  {cpu}{}", taken(notice.is_some())))?;
    }
    if adapters.is_empty() {
        return Err(Error::NoAdapter(format!(
            "expected a Vulkan, Metal or DX12 adapter, found none; {NO_ADAPTER_HINT}; `wgrad train` uses the CPU until then"
        )));
    }
    Ok(())
}

fn fingerprint(number: usize) -> Result<Fingerprint> {
    Fingerprint::of(&Gpu::open(&Choice::Number(number))?)
}

/// What operations cost there, as far as it is known.
fn prices(report: &AdapterReport) -> Prices {
    let folder = tune::cache_folder();
    tune::known_prices(report, folder.as_deref()).unwrap_or(report.prices)
}

fn rows(report: &AdapterReport) -> Vec<Vec<String>> {
    let yes = |flag| if flag { "yes" } else { "no" }.to_string();
    let bytes = |n| BinaryBytes(n).to_string();
    let count = |n: u32| HumanCount(n.into()).to_string();
    [
        ("type", report.kind.to_string()),
        ("backend", report.backend.clone()),
        ("driver", report.driver.clone()),
        (
            "PCI bus id",
            report.pci_bus_id.clone().unwrap_or_else(|| "none".into()),
        ),
        (
            "subgroup size",
            match report.subgroup_size {
                None => "no subgroup operations".into(),
                Some([min, max]) if min == max => min.to_string(),
                Some([min, max]) => format!("{min} to {max}"),
            },
        ),
        (
            "largest storage binding",
            bytes(report.max_storage_binding_bytes),
        ),
        ("largest buffer", bytes(report.max_buffer_bytes)),
        (
            "workgroup memory",
            bytes(report.max_workgroup_storage_bytes.into()),
        ),
        (
            "invocations per workgroup",
            count(report.max_workgroup_invocations),
        ),
        (
            "workgroups per dimension",
            count(report.max_workgroups_per_dimension),
        ),
        (
            "storage offset alignment",
            bytes(report.storage_offset_alignment.into()),
        ),
        ("timestamp queries", yes(report.timestamp_query)),
        ("16-bit floats", yes(report.shader_f16)),
        ("64-bit integers", yes(report.shader_int64)),
        ("cooperative matrices", report.matrices()),
        ("prices", prices(report).to_string()),
    ]
    .into_iter()
    .map(|(what, value)| vec![what.to_string(), value])
    .collect()
}
