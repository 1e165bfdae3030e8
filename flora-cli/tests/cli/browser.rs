//! A page in a headless Chromium, spoken to by its DevTools protocol over two pipes: messages are JSON with a zero byte behind.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use flora_toolchain::Chromium;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything of a page takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A browser with one page.
pub(crate) struct Page {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    last: u64,
    /// Which page messages are about.
    session: Option<String>,
    /// What the page complained of.
    complaints: Vec<String>,
    _profile: TempDir,
}

impl Page {
    /// Opens one.
    pub(crate) fn open(chromium: &Chromium, url: &str) -> Self {
        let profile = tempfile::tempdir().expect("a temporary folder");
        let browser = chromium.command(profile.path());
        // It reads from descriptor 3 and writes to 4.
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 >/dev/null", "sh"]);
        command.arg(browser.get_program()).args(browser.get_args()).arg("--remote-debugging-pipe");
        command.envs(browser.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("a shell");
        let (to, stdout) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        let (sender, from) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(stdout).split(0) {
                let message = message.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
                if message.is_none_or(|message| sender.send(message).is_err()) {
                    return;
                }
            }
        });
        let mut page = Self { child, to, from, last: 0, session: None, complaints: Vec::new(), _profile: profile };
        let target = page.call("Target.createTarget", json!({"url": "about:blank"}));
        let attached = page.call("Target.attachToTarget", json!({"targetId": target["targetId"], "flatten": true}));
        page.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Runtime", "Log", "Network", "Page"] {
            page.call(&format!("{domain}.enable"), json!({}));
        }
        page.call("Page.navigate", json!({"url": url}));
        page.awaited("document.readyState == 'complete' && location.protocol != 'about:'");
        page
    }

    /// What the browser answers to a method of the protocol.
    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last += 1;
        let mut message = json!({"id": self.last, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.to.write_all(format!("{message}\0").as_bytes()).expect("the browser listens");
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut message =
                self.from.recv_timeout(left).unwrap_or_else(|_| panic!("the browser is silent after {method}"));
            if message["id"] == self.last {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].take();
            }
            self.complaints.extend(complaint(&message));
        }
    }

    /// The value of an expression in the page.
    pub(crate) fn value(&mut self, expression: &str) -> Value {
        let parameters = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut answer = self.call("Runtime.evaluate", parameters);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].take()
    }

    /// The value of an expression, as soon as it is one that JavaScript takes for true.
    pub(crate) fn awaited(&mut self, expression: &str) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let value = self.value(expression);
            if ![json!(null), json!(false), json!(0), json!("")].contains(&value) {
                return value;
            }
            assert!(
                Instant::now() < end,
                "never true: {expression}; the page: {}",
                self.value("document.body.innerText")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types into what has the focus, as a keyboard does.
    pub(crate) fn typed(&mut self, text: &str) {
        self.call("Input.insertText", json!({"text": text}));
    }

    /// Presses the return key.
    pub(crate) fn entered(&mut self) {
        let key =
            json!({"type": "keyDown", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"});
        self.call("Input.dispatchKeyEvent", key);
        self.call("Input.dispatchKeyEvent", json!({"type": "keyUp", "key": "Enter", "code": "Enter"}));
    }

    /// Clicks in the middle of the element that a selector finds.
    pub(crate) fn clicked(&mut self, selector: &str) {
        let place = self.value(&format!(
            "(() => {{ const element = document.querySelector({selector:?}); element.scrollIntoView(); \
             const box = element.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }})()"
        ));
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({"type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", event);
        }
    }

    /// Errors and warnings of its console, exceptions that nothing caught, and requests that failed or were refused.
    pub(crate) fn complaints(&mut self) -> &[String] {
        // Whatever was said before the answer to this.
        self.value("0");
        &self.complaints
    }
}

/// What an event complains of.
fn complaint(event: &Value) -> Option<String> {
    let about = &event["params"];
    let is_complaint = match event["method"].as_str()? {
        "Runtime.exceptionThrown" => true,
        "Runtime.consoleAPICalled" => matches!(about["type"].as_str(), Some("error" | "warning" | "assert")),
        "Log.entryAdded" => matches!(about["entry"]["level"].as_str(), Some("error" | "warning")),
        // A request that the page itself gives up is none.
        "Network.loadingFailed" => about["canceled"] != true,
        "Network.responseReceived" => about["response"]["status"].as_u64().is_none_or(|status| status >= 400),
        _ => false,
    };
    is_complaint.then(|| event.to_string())
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
