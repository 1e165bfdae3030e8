//! What the author of a layer sees: one mistake a file, and items that must compile. `TRYBUILD=overwrite` updates the
//! expected messages; they are those of the compiler that the README pins.

#[test]
fn mistakes_are_errors_at_their_tokens() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/ui/pass/*.rs");
    cases.compile_fail("tests/ui/fail/*.rs");
}
