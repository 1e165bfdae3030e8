//! The client of the OpenAI API: that the pinned packages are still served, and that the machine's Python imports them.
//!
//! `FLORA_OPENAI=required` fetches them; without it this test uses what was fetched before, and says so when there is none.

#[test]
fn the_pinned_client_is_what_python_imports() {
    let python = flora_toolchain::openai_client_from_environment()
        .expect("FLORA_OPENAI=required, but the openai package can't be had");
    let Some(python) = python else {
        eprintln!("NOT RUN: the openai package was not fetched; FLORA_OPENAI=required fetches it");
        return;
    };
    let output = python.command().args(["-c", "import openai; print(openai.__version__)"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let pin = include_str!("../src/python/openai.txt").lines().find_map(|line| line.strip_prefix("openai=="));
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert_eq!(pin.map(|pin| pin.trim_end_matches([' ', '\\'])), Some(version.as_str()));
}
