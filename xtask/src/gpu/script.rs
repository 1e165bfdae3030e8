//! The folder's script, run with programs that stand in for the real ones: what it does when they fail, hang or are missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::folder::{Contents, make};

/// Answers as `flora` does. Each format of quantised weights goes wrong in a way of its own.
const FLORA: &str = r#"#!/bin/sh
case "$*${FAKE_DRIVER:-}${FLORA_KERNELS:+, with kernels}" in
    "devices --json, old, with kernels") echo "[{\"id\": \"host\"}]" ;;
    devices*) echo "[{\"id\": \"host\"}, {\"id\": \"${FAKE_DEVICE:-cuda:0}\"}]" ;;
    tune*) echo "{\"path\": \"$FLORA_CONFIG\"}" ;;
    *q8_0*) printf "error: it broke\nusage: flora\n" >&2; exit 3 ;;
    *int8*) echo "no measurement" ;;
    *q4_0*) echo "[]" ;;
    *) echo "[{\"seconds\": 0.001}]" ;;
esac
"#;
/// Answers as libtest does, says where it was told to look, and takes `FAKE_SECONDS` over it.
const CONFORMANCE: &str = r#"#!/bin/sh
echo "running 2 tests"
echo "test formats::every_format_equals_the_oracle ... ok"
echo "NOT RUN on $FLORA_TEST_DEVICE: bf16: no bf16 buffers"
echo "kernels in ${FLORA_KERNELS:-nothing}, else by ${FLORA_NVRTC:-nothing}"
printf "kept tile\ncompiled tile\nkept reduce\n" >"$FLORA_KERNELS_LOG"
ls "$FLORA_GOLDEN" "$CUDA_PATH"
sleep "${FAKE_SECONDS:-0}" & wait
[ -z "${FAKE_FAILURE:-}" ] || { echo "test golden::kernels ... FAILED"; exit 101; }
"#;
/// The same of the driver's tests, which need the library that plays a driver, and headers.
const LAUNCHES: &str = r#"#!/bin/sh
[ -f "$FLORA_EMULATED_DRIVER" ] && [ -n "$CUDA_PATH" ] || { echo "test launches ... FAILED"; exit 101; }
echo "test launches ... ok"
"#;
/// A PyTorch that sees a GPU.
const TORCH: &str = r"
__version__ = '2.11.0'
class version: cuda = '13.0'
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda index: 'a GPU')
";

/// A folder made of the programs above.
struct World {
    root: TempDir,
}

impl World {
    /// `None`, said aloud, where there is no Python to run the script.
    fn new() -> Option<Self> {
        let python = Command::new("python3").arg("--version").stdout(Stdio::null()).status();
        if !python.is_ok_and(|status| status.success()) {
            println!("NOT RUN: there is no python3");
            return None;
        }
        // The blank is part of the test.
        let root = tempfile::Builder::new().prefix("flora gpu ").tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for folder in ["peers", "golden/mixed", "golden/peft/lora", "site"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        program(&at("flora"), FLORA);
        program(&at("conformance"), CONFORMANCE);
        program(&at("launches"), LAUNCHES);
        for library in ["libnvrtc.so", "libemulated.so"] {
            fs::write(at(library), "no library").unwrap();
        }
        fs::write(at("peers/torch_lora.py"), "print('right')").unwrap();
        fs::write(at("golden/peft/lora/config.json"), "{}").unwrap();
        fs::write(at("site/torch.py"), TORCH).unwrap();
        let [flora, conformance, launches] = ["flora", "conformance", "launches"].map(&at);
        let [nvrtc, emulated, peers, golden] = ["libnvrtc.so", "libemulated.so", "peers", "golden"].map(&at);
        let contents = Contents {
            flora: &flora,
            conformance: &conformance,
            launches: &launches,
            nvrtc: &nvrtc,
            emulated: &emulated,
            peers: &peers,
            golden: &golden,
            build: r#"{"commit": "0123"}"#,
        };
        make(&contents, &at("gpu")).unwrap();
        Some(Self { root })
    }

    /// The script; PyTorch is there when `torch` says so.
    fn script(&self, torch: bool, arguments: &[&str]) -> Command {
        self.script_at("gpu/run.sh", torch, arguments)
    }

    fn script_at(&self, script: &str, torch: bool, arguments: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command.arg(self.root.path().join(script)).args(arguments);
        command.current_dir("/").env("PYTHON", "python3").stdout(Stdio::null()).stderr(Stdio::null());
        command.env("PYTHONPATH", if torch { self.root.path().join("site") } else { PathBuf::new() });
        command
    }

    fn report(&self) -> Value {
        self.report_at("gpu/results/report.json")
    }

    fn report_at(&self, path: &str) -> Value {
        let path = self.root.path().join(path);
        serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    }
}

fn program(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A step's entry.
fn step<'a>(report: &'a Value, name: &str) -> &'a Value {
    let found = report["steps"].as_array().unwrap().iter().find(|entry| entry["name"] == name);
    found.unwrap_or_else(|| panic!("no step {name} in {report:#}"))
}

/// (name, outcome) of every step.
fn outcomes(report: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    report["steps"].as_array().unwrap().iter().map(|entry| (text(&entry["name"]), text(&entry["outcome"]))).collect()
}

#[test]
fn a_failing_step_is_reported_and_the_next_ones_run() {
    let Some(world) = World::new() else { return };
    let status = world.script(true, &[]).env("FAKE_FAILURE", "1").status().unwrap();
    assert_eq!(status.code(), Some(1));
    let report = world.report();
    for (name, outcome) in outcomes(&report) {
        let bad = ["q8_0", "int8", "q4_0", "conformance"].iter().any(|word| name.contains(word));
        assert_eq!(outcome, if bad { "failed" } else { "ok" }, "{name}");
    }
    assert_eq!(report["steps"].as_array().unwrap().len(), 5 + 7 + 2 + 3 + 20);
    assert_eq!(report["build"]["commit"], "0123");
    assert_eq!(report["machine"]["torch"]["version"], "2.11.0");
    let conformance = step(&report, "conformance-first");
    assert_eq!(conformance["exit_code"], 101);
    assert_eq!(conformance["reason"], "exit status 101: golden::kernels failed");
    assert_eq!(conformance["tests"]["passed"], 1);
    assert_eq!(conformance["tests"]["not_run"][0], "NOT RUN on cuda: bf16: no bf16 buffers");
    let printed = conformance["stdout"].as_str().unwrap();
    assert!(["lora", "include", "lib64"].iter().all(|name| printed.contains(name)), "{printed}");
    assert_eq!(step(&report, "layers-15b-query-f16-q8_0-decode")["reason"], "exit status 3: error: it broke");
    assert_eq!(step(&report, "layers-15b-query-f16-q8_0-decode")["exit_code"], 3);
    assert_eq!(step(&report, "layers-15b-query-f16-q4_0-decode")["reason"], "no array of layers");
    let layers = step(&report, "layers-15b-query-f16-decode");
    assert_eq!(layers["result"][0]["seconds"], 0.001);
    assert_eq!(layers["peer_not_run"], Value::Null);
    let command = layers["command"].as_array().unwrap();
    let peer = command[command.iter().position(|word| word == "--peer").unwrap() + 1].as_str().unwrap();
    assert!(peer.ends_with("peers/torch_lora.py --device cuda"), "{peer}");
}

#[test]
fn without_pytorch_the_comparison_is_listed_as_not_run() {
    let Some(world) = World::new() else { return };
    let only = ["--only", "peer-check", "--only", "layers-15b-query-f16-decode"];
    let mut script = world.script(false, &only);
    // Whatever PyTorch this machine's own Python has.
    fs::write(world.root.path().join("site/torch.py"), "raise ImportError('no PyTorch here')").unwrap();
    script.env("PYTHONPATH", world.root.path().join("site"));
    assert_eq!(script.status().unwrap().code(), Some(0));
    let report = world.report();
    let expected = [("devices", "ok"), ("peer-check", "not_run"), ("layers-15b-query-f16-decode", "ok")]
        .map(|(name, outcome)| (name.to_owned(), outcome.to_owned()));
    assert_eq!(outcomes(&report), expected);
    for name in ["peer-check", "layers-15b-query-f16-decode"] {
        let key = if name == "peer-check" { "reason" } else { "peer_not_run" };
        assert!(step(&report, name)[key].as_str().unwrap().contains("no PyTorch here"), "{report:#}");
    }
    assert!(!step(&report, "layers-15b-query-f16-decode")["command"].as_array().unwrap().contains(&"--peer".into()));
    assert_eq!(script.arg("--strict").status().unwrap().code(), Some(1));
}

#[test]
fn without_the_device_nothing_else_runs_and_the_script_fails() {
    let Some(world) = World::new() else { return };
    let status = world.script(true, &[]).env("FAKE_DEVICE", "wgpu:0").status().unwrap();
    assert_eq!(status.code(), Some(1));
    let report = world.report();
    for (name, outcome) in outcomes(&report) {
        assert_eq!(outcome, if name == "devices" { "failed" } else { "not_run" }, "{name}");
    }
    assert_eq!(step(&report, "tune")["reason"], "flora lists no device cuda, only host, wgpu:0");
}

#[test]
fn the_budget_ends_steps_and_the_rest_is_listed() {
    let Some(world) = World::new() else { return };
    let start = Instant::now();
    let status = world.script(true, &["--minutes", "0.1"]).env("FAKE_SECONDS", "600").status().unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(start.elapsed() < Duration::from_secs(60));
    let report = world.report();
    assert_eq!(step(&report, "conformance-first")["outcome"], "timed_out");
    assert_eq!(step(&report, "conformance-first")["tests"]["passed"], 1, "what passed until then");
    assert_eq!(report["steps"].as_array().unwrap().len(), 5 + 7 + 2 + 3 + 20);
    assert!(report["seconds"].as_f64().unwrap() < 7.5, "{}", report["seconds"]);
}

#[test]
fn a_stopped_script_leaves_the_report_and_no_process() {
    let Some(world) = World::new() else { return };
    let mut script = world.script(true, &["--only", "conformance-*"]).env("FAKE_SECONDS", "61.25").spawn().unwrap();
    let begun = world.root.path().join("gpu/results/outputs/conformance-first.out");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !fs::read_to_string(&begun).is_ok_and(|text| text.contains("lib64")) {
        assert!(Instant::now() < deadline, "the step never began");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(Command::new("kill").arg(script.id().to_string()).status().unwrap().success());
    assert_eq!(script.wait().unwrap().code(), Some(1));
    let report = world.report();
    for name in ["conformance-first", "conformance-formats", "conformance-rest"] {
        assert_eq!(step(&report, name)["reason"], "stopped by SIGTERM");
        assert_eq!(step(&report, name)["outcome"], "not_run");
    }
    let processes = Command::new("ps").args(["-eo", "args"]).output();
    if let Ok(processes) = processes {
        assert!(!String::from_utf8_lossy(&processes.stdout).contains("sleep 61.25"));
    }
}

#[test]
fn a_rehearsal_is_marked_and_keeps_kernels() {
    let Some(world) = World::new() else { return };
    let mut script = world.script(false, &["--rehearse", "sm_80", "--keep-kernels"]);
    assert_eq!(script.env("FAKE_DEVICE", "cuda-emulated:sm_80").status().unwrap().code(), Some(1), "q4_0 is no array");
    let report = world.report();
    assert_eq!(report["device"], "cuda-emulated:sm_80");
    assert!(report["rehearsal"].as_str().unwrap().contains("No time in it says anything of a card"));
    assert_eq!(report["steps"].as_array().unwrap().len(), 5 + 7 + 2 + 3 + 20, "the steps of a card's report");
    assert_eq!(report["kernels"], serde_json::json!({ "use": "kept", "carried": 0, "afterwards": 0 }));
    let first = step(&report, "conformance-first");
    let folder = world.root.path().join("gpu/kernels");
    let printed = first["stdout"].as_str().unwrap();
    assert!(printed.contains(&format!("kernels in {}, else by nothing", folder.display())), "{printed}");
    assert_eq!(first["kernels"], serde_json::json!({ "kept": 2, "compiled": 1 }));
    for name in ["tune", "conformance-rest", "serving-starcoder-15b"] {
        assert!(step(&report, name)["reason"].as_str().unwrap().contains("an emulated card takes"), "{name}");
    }
    assert_eq!(step(&report, "layers-15b-query-f16-decode")["outcome"], "ok");
    let command = step(&report, "layers-15b-query-f16-decode")["command"].to_string();
    assert!(command.contains("64,128") && command.contains("cuda-emulated:sm_80"), "{command}");

    let only = ["--rehearse", "sm_80", "--only", "conformance-rest"];
    assert_eq!(world.script(false, &only).env("FAKE_DEVICE", "cuda-emulated:sm_80").status().unwrap().code(), Some(0));
    let report = world.report();
    assert_eq!(step(&report, "conformance-rest")["outcome"], "ok", "what is asked for by name runs");
    assert_eq!(report["kernels"]["use"], "not used");
}

#[test]
fn an_archive_unpacks_itself_and_brings_kernels_along() {
    let Some(world) = World::new() else { return };
    let at = |name: &str| world.root.path().join(name);
    fs::create_dir(at("gpu/kernels")).unwrap();
    fs::write(at("gpu/kernels/0123.sm_90a.cubin"), "machine code").unwrap();
    super::archive::pack(&at("gpu")).unwrap();
    // A toolkit with NVRTC in it, which the library that came along is put before.
    for file in
        ["include/cuda_runtime.h", "include/cuda_fp16.h", "include/cuda_bf16.h", "include/mma.h", "include/crt/mma.h"]
    {
        fs::create_dir_all(at("cuda").join(file).parent().unwrap()).unwrap();
        fs::write(at("cuda").join(file), "").unwrap();
    }
    fs::create_dir(at("cuda/lib64")).unwrap();
    fs::write(at("cuda/lib64/libnvrtc.so.12"), "NVRTC").unwrap();
    let carried = at("card");
    fs::create_dir(&carried).unwrap();
    for file in ["gpu.sh", "gpu.tar.xz"] {
        fs::rename(at(file), carried.join(file)).unwrap();
    }
    let run = |arguments: &[&str], driver: &str| {
        let arguments = [&["--only", "conformance-first"][..], arguments].concat();
        let mut script = world.script_at("card/gpu.sh", false, &arguments);
        script.env("CUDA_PATH", at("cuda")).env("FAKE_DRIVER", driver);
        assert_eq!(script.status().unwrap().code(), Some(0));
        let report = world.report_at("card/gpu/results/report.json");
        (report["kernels"].clone(), step(&report, "conformance-first")["stdout"].as_str().unwrap().to_owned())
    };
    let (kernels, printed) = run(&[], "");
    assert_eq!(kernels, serde_json::json!({ "use": "found", "carried": 1, "afterwards": 1 }));
    let (folder, real) = (carried.join("gpu/kernels"), at("cuda/lib64/libnvrtc.so.12"));
    let expected = format!("kernels in {}, else by {}", folder.display(), real.display());
    assert!(printed.contains(&expected), "{printed}");
    let (kernels, printed) = run(&["--compile"], "");
    assert_eq!(kernels["use"], "not used");
    assert!(printed.contains("kernels in nothing, else by nothing"), "{printed}");
    // A driver that doesn't take the machine code.
    let (kernels, printed) = run(&[], ", old");
    assert!(
        kernels["use"].as_str().unwrap().starts_with("not used: with them flora lists no device cuda"),
        "{kernels}"
    );
    assert!(printed.contains("kernels in nothing, else by /"), "{printed}");
    // Without its archive the script has nothing to run.
    fs::rename(carried.join("gpu.sh"), at("gpu.sh")).unwrap();
    assert_eq!(world.script_at("gpu.sh", false, &[]).status().unwrap().code(), Some(2));
}

#[test]
fn wrong_usage_is_refused() {
    let Some(world) = World::new() else { return };
    for arguments in
        [&["--only", "layer"][..], &["--minutes", "0"], &["--minutes", "nan"], &["--nothing"], &["--keep-kernels"]]
    {
        assert_eq!(world.script(true, arguments).status().unwrap().code(), Some(2), "{arguments:?}");
    }
    assert_eq!(world.script(true, &[]).env("PYTHON", "/nowhere/python3").status().unwrap().code(), Some(2));
    assert!(!world.root.path().join("gpu/results").exists());
}

/// Lays out what there is in `root`, a toolkit or the folder of Python's packages, and nothing that this machine has.
fn lay_out(world: &World, toolkits: &str, sites: &str) -> Value {
    const PROGRAM: &str = "import json, sys, toolkit; from pathlib import Path as P
toolkit.toolkits = lambda environment: [P(path) for path in sys.argv[2].split()]
print(json.dumps(toolkit.lay_out(P(sys.argv[1]), [P(path) for path in sys.argv[3].split()], {'LD_LIBRARY_PATH': '/own'})))";
    let scratch = world.root.path().join("scratch");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir(&scratch).unwrap();
    let mut python = Command::new("python3");
    python.args(["-c", PROGRAM]).arg(&scratch).args([toolkits, sites]).current_dir(world.root.path());
    let output = python.env("PYTHONPATH", world.root.path().join("gpu/measure")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_toolkit_is_taken_whole_and_packages_are_put_together() {
    let Some(world) = World::new() else { return };
    let at = |name: &str| world.root.path().join(name);
    let put = |folder: &str, files: &[&str]| {
        for file in files {
            let path = at(folder).join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, folder).unwrap();
        }
    };
    let headers = ["include/cuda_runtime.h", "include/cuda_fp16.h", "include/cuda_bf16.h", "include/mma.h"];
    put("cuda", &headers);
    put(
        "cuda",
        &["include/crt/mma.h", "lib64/libnvrtc.so.13", "lib64/libnvrtc-builtins.so.13.0", "lib64/libcublas.so.13"],
    );
    fs::write(at("cuda/include/cuda.h"), "#define CUDA_VERSION 13010\n").unwrap();
    // Without the headers below crt/, for which there is another package.
    put("old", &headers);
    put("site/nvidia/cuda_runtime", &headers);
    put("site/nvidia/cuda_nvrtc", &["lib/libnvrtc.so.12", "lib/libnvrtc-builtins.so.12.8", "lib/libnvrtc.alt.so.12"]);
    put("site/triton/backends/nvidia", &["include/crt/mma.h", "include/mma.h"]);
    let (include, library) = (at("scratch/include"), at("scratch/lib64"));

    let found = lay_out(&world, "old cuda", "site");
    assert_eq!(found["headers"], serde_json::json!(["cuda/include"]));
    assert_eq!(found["version"], "13.1");
    assert_eq!(found["missing_headers"], serde_json::json!([]));
    assert_eq!(fs::read_to_string(library.join("libnvrtc.so")).unwrap(), "cuda");
    assert!(!library.join("libcublas.so.13").exists(), "PyTorch keeps its own");
    let path = found["environment"]["LD_LIBRARY_PATH"].as_str().unwrap();
    assert!(path.starts_with(&format!("{}:/own", library.display())), "{path}");

    let found = lay_out(&world, "old", "site");
    assert_eq!(found["missing_headers"], serde_json::json!([]));
    assert_eq!(fs::read_to_string(include.join("mma.h")).unwrap(), "site/nvidia/cuda_runtime", "the first wins");
    assert_eq!(fs::read_to_string(include.join("crt/mma.h")).unwrap(), "site/triton/backends/nvidia");
    assert_eq!(fs::read_to_string(library.join("libnvrtc.so")).unwrap(), "site/nvidia/cuda_nvrtc");
    assert!(library.join("libnvrtc-builtins.so.12.8").is_file());

    let found = lay_out(&world, "old nowhere", "nowhere");
    assert_eq!(found["missing_headers"], serde_json::json!(["crt/mma.h"]));
    assert_eq!(found["nvrtc"], Value::Null);
    assert_eq!(lay_out(&world, "nowhere", "nowhere")["missing_headers"].as_array().unwrap().len(), 5);
}
