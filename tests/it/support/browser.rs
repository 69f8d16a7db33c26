//! A real browser, and processes that serve pages.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};

use super::PATIENCE;
use super::parts::{Part, skip};

/// A process that serves something, killed at the end.
pub struct Server {
    pub child: Child,
    pub url: String,
}

impl Server {
    /// Starts a command and waits for the line that says where it is.
    pub fn start(mut command: Command, before: &str, after: &[char]) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let url = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let rest = line.split_once(before)?.1;
            Some(rest.split(after).next()?.to_string())
        });
        // What it says later is read, so that it never waits for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, url: url.expect("it never said where it is") }
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap(); // SIGKILL
        self.child.wait().unwrap();
    }

    /// Waits until the process ends by itself.
    pub fn ended(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Chromium without a window, and what drives it.
pub struct Browser {
    pub page: Page,
    _driver: Server,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts Chromium; `None`, with a message, where there is none.
    pub async fn start() -> Option<Self> {
        if Command::new("chromedriver").arg("--version").output().is_err() {
            skip(Part::Chromium, "there is no chromedriver; `apt-get install chromium-driver` brings it");
            return None;
        }
        let mut driver = Command::new("chromedriver");
        driver.arg("--port=0");
        let driver = Server::start(driver, "started successfully on port ", &['.']);
        let profile = tempfile::tempdir().unwrap();
        let arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            .map(String::from)
            .into_iter()
            .chain([format!("--user-data-dir={}", profile.path().display())])
            .collect::<Vec<_>>();
        let wanted = json!({"goog:chromeOptions": {"args": arguments}});
        let Value::Object(wanted) = wanted else { unreachable!() };
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(wanted)
            .connect(&format!("http://127.0.0.1:{}", driver.url))
            .await
            .unwrap();
        Some(Self { page: Page(client), _driver: driver, _profile: profile })
    }
}

/// A page in the browser.
pub struct Page(pub Client);

impl Page {
    pub async fn text(&self, css: &str) -> String {
        self.0.find(Locator::Css(css)).await.unwrap().text().await.unwrap()
    }

    /// Waits until a part of the page says something.
    pub async fn sees(&self, css: &str, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = match self.0.find(Locator::Css(css)).await {
                Ok(found) => found.text().await.unwrap_or_default(), // it may have been replaced meanwhile
                Err(_) => String::new(),
            };
            if text.contains(wanted) {
                return;
            }
            assert!(Instant::now() < deadline, "{css} says {text:?}, not {wanted:?}");
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// How many elements match.
    pub async fn count(&self, css: &str) -> usize {
        self.0.find_all(Locator::Css(css)).await.unwrap().len()
    }

    pub async fn types(&self, keys: &str) {
        let body = self.0.find(Locator::Css("body")).await.unwrap();
        body.send_keys(keys).await.unwrap();
    }

    /// Replaces what is in a field.
    pub async fn fills(&self, css: &str, text: &str) {
        let field = self.0.find(Locator::Css(css)).await.unwrap();
        field.clear().await.unwrap();
        field.send_keys(text).await.unwrap();
    }

    pub async fn clicks(&self, css: &str) {
        self.0.find(Locator::Css(css)).await.unwrap().click().await.unwrap();
    }
}
