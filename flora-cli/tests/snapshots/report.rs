//! The page of checked-in measurements, so that it is the same on every machine.

use std::path::Path;
use std::process::Command;

#[test]
fn page() {
    let given = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let page = folder.path().join("report.html");
    let output = Command::new(env!("CARGO_BIN_EXE_flora"))
        .arg("report")
        .args([Path::new("--coefficients"), &given.join("coefficients.json")])
        .args([Path::new("--paper"), &given.join("report/paper.json")])
        .args([Path::new("--planner"), &given.join("report/planner.json")])
        .args([Path::new("--output"), &page])
        .output()
        .expect("the command runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    insta::assert_snapshot!("page", std::fs::read_to_string(page).expect("the page"));
}
