//! The page at `/` as a person's browser shows it: two adapters side by side, the adapters, their memory and the running batch.
//!
//! `FLORA_CHROMIUM=required` fetches the browser; without it this test uses what was fetched before, and says so when there is none.
#![cfg(unix)]

use std::path::Path;

use flora_toolchain::Chromium;
use serde_json::{Value, json};

use super::browser::Page;
use super::server::Server;
use super::serving::Tiny;

/// The texts of a side's turns of a role.
fn turns(side: usize, role: &str) -> String {
    format!(
        "[...document.querySelectorAll('main section')[{side}].querySelectorAll('.{role}')].map(turn => turn.textContent)"
    )
}

/// What the page says of the batch under a name.
fn number(name: &str) -> String {
    let found =
        format!("[...document.querySelectorAll('#numbers span')].find(span => span.textContent.startsWith({name:?}))");
    format!("{found}?.querySelector('b').textContent")
}

#[test]
fn two_adapters_answer_side_by_side_in_a_browser() {
    let chromium = Chromium::from_environment().expect("FLORA_CHROMIUM=required, but Chromium can't be had");
    let Some(chromium) = chromium else {
        println!("NOT RUN: Chromium was not fetched; FLORA_CHROMIUM=required fetches it");
        return;
    };
    let tiny = Tiny::new();
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama_tiny/adapters");
    let template = Path::new(&tiny.model).join("chat_template.jinja");
    std::fs::write(&template, "{% for message in messages %}{{ message.content }} {% endfor %}").expect("a file");
    let server = Server::start(["--model", &tiny.model, "--adapters", &adapters.display().to_string(), "--port", "0"]);

    let mut page = Page::open(&chromium, &server.url());
    // The base model and the adapters can be chosen on either side, and the adapters are listed.
    let models = page.awaited(
        "(list => list.length && list)([...document.querySelectorAll('select')[0].options].map(o => o.value))",
    );
    assert_eq!(models, json!(["tiny", "hira", "lora"]));
    page.awaited("document.querySelectorAll('#adapters tr').length == 2");
    assert_eq!(
        page.value("[...document.querySelectorAll('#adapters tr')].map(row => row.cells[0].textContent)"),
        json!(["hira", "lora"])
    );
    page.awaited(&format!("{} === '0, 0.0 KiB'", number("adapters resident")));
    for (side, adapter) in [(0, "hira"), (1, "lora")] {
        page.value(&format!("document.querySelectorAll('select')[{side}].value = {adapter:?}"));
    }

    // Text comes on both sides, of each side's own adapter.
    page.value("document.querySelector('#most').value = 24");
    page.clicked("#text");
    page.typed("Who are you?");
    page.entered();
    let both = [turns(0, "assistant"), turns(1, "assistant")].map(|answers| format!("({answers})[0]"));
    page.awaited(&format!("!running && {} && {}", both[0], both[1]));
    let answers = both.map(|answer| page.value(&answer));
    for (answer, adapter) in answers.iter().zip(["hira", "lora"]) {
        let asked = json!({"model": adapter, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 24,
            "temperature": 0});
        let told = server.post("/v1/chat/completions", &asked);
        let told: Value = serde_json::from_str(told.split_once("\r\n\r\n").expect("a body").1).expect("JSON");
        assert_eq!(told["choices"][0]["message"]["content"], *answer, "{adapter}");
    }
    assert_ne!(answers[0], answers[1]);

    // A second turn goes on with the first, by the button.
    page.clicked("#text");
    page.typed("more");
    page.clicked("#ask button");
    page.awaited(&format!("!running && {}.length == 2", turns(1, "assistant")));
    for side in [0, 1] {
        assert_eq!(page.value(&turns(side, "user")), json!(["Who are you?", "more"]));
    }
    // What has run is told: the adapters are resident, and tokens were generated.
    page.awaited(&format!("!({}).startsWith('0,')", number("adapters resident")));
    let resident = page.value(&number("adapters resident"));
    assert!(resident.as_str().is_some_and(|text| text.starts_with("2, ") && !text.ends_with(" 0.0 KiB")), "{resident}");
    assert_ne!(page.awaited(&format!("Number({})", number("tokens generated"))), json!(0));

    // While a long request runs, the batch and its adapter are shown.
    let asked = json!({"model": "lora", "prompt": "a", "n": 4096, "max_tokens": 80, "ignore_eos": true});
    page.value(&format!(
        "globalThis.long = new AbortController(); fetch('v1/completions', {{ method: 'POST', headers: headers(), \
         body: JSON.stringify({asked}), signal: long.signal }}).catch(() => {{}}); 0"
    ));
    page.awaited(&format!("numbers().then(() => Number({}) > 0)", number("running")));
    let shown = "[...document.querySelectorAll('#adapters tr')].map(row => row.cells[1].textContent)";
    page.awaited(&format!("({shown}).join() === ',running'"));
    page.value("long.abort()");
    page.awaited(&format!("numbers().then(() => {} === '0')", number("running")));

    page.clicked("#new");
    assert_eq!(page.value("document.querySelectorAll('.turn').length"), json!(0));
    assert_eq!(page.complaints(), [""; 0]);
    page.value("console.error('heard'); fetch('nowhere').then(() => 0)");
    let heard = ["Runtime.consoleAPICalled", "Network.responseReceived"]
        .map(|event| page.complaints().iter().any(|complaint| complaint.contains(event)));
    assert_eq!(heard, [true; 2], "what a page complains of is heard");
    assert!(server.stop().success());
}
