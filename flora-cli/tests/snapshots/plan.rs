//! The plan tables of StarCoder with a checked-in file of coefficients, so that they are the same on every machine.

use std::path::Path;
use std::process::Command;

#[test]
fn starcoder() {
    let coefficients = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/coefficients.json");
    for model in ["starcoder-15b", "starcoder-3b", "starcoder-1b"] {
        for (regime, segments, tokens) in [("decode", "32", "1"), ("prefill", "8", "128")] {
            let output = Command::new(env!("CARGO_BIN_EXE_flora"))
                .args(["plan", "--model", model, "--ranks", "1,2,4,8,16", "--segments", segments, "--tokens", tokens])
                .arg("--coefficients")
                .arg(&coefficients)
                .output()
                .expect("the command runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            insta::assert_snapshot!(format!("{model} {regime}"), String::from_utf8_lossy(&output.stdout));
        }
    }
}
