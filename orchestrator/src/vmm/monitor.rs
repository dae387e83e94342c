//! Two ways of telling a VMM what to do while it runs: QEMU's monitor, and HTTP.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// How long an answer may take; a machine whose processors are all busy is slow to give any.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest answer that is read.
const ANSWER_MAX: u64 = 1 << 20;

/// What a VMM did not do.
#[derive(Debug, thiserror::Error)]
pub(super) enum MonitorError {
    /// The connection failed.
    #[error("the connection to the VMM failed")]
    Lost(#[from] std::io::Error),
    /// It said no.
    #[error("the VMM refuses: {0}")]
    Refused(String),
    /// It said something that is no answer.
    #[error("the VMM's answer is not understood")]
    Answer,
    /// It said nothing.
    #[error("the VMM did not answer in time")]
    Silent,
}

/// QEMU's monitor: one line of JSON after the other, answers and events mixed.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    /// Number of the last command, which its answer bears as well.
    last: u64,
}

impl Qmp {
    /// Greets QEMU, which has connected.
    pub(super) async fn greet(stream: UnixStream) -> Result<Self, MonitorError> {
        let mut qmp = Self {
            stream: BufReader::new(stream),
            last: 0,
        };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Has a command carried out.
    pub(super) async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<(), MonitorError> {
        self.send(command, arguments).await?;
        let id = self.last;
        self.wait_for(|message| answered(message, id)).await
    }

    async fn send(&mut self, command: &str, arguments: Value) -> Result<(), MonitorError> {
        self.last += 1;
        let line = json!({ "execute": command, "arguments": arguments, "id": self.last });
        let line = format!("{line}\n");
        self.stream.get_mut().write_all(line.as_bytes()).await?;
        Ok(())
    }

    /// Takes a device away and waits until the guest has let it go.
    pub(super) async fn unplug(&mut self, device: &str) -> Result<(), MonitorError> {
        self.send("device_del", json!({ "id": device })).await?;
        let id = self.last;
        // The event may come before the answer.
        self.wait_for(|message| {
            match answered(message, id) {
                // It was asked before, and is still at it.
                Some(Err(MonitorError::Refused(text))) if text.contains("in the process") => {}
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(())) | None => {}
            }
            let event = message.get("event").and_then(Value::as_str)?;
            let of = message.pointer("/data/device").and_then(Value::as_str)?;
            match event {
                "DEVICE_DELETED" if of == device => Some(Ok(())),
                "DEVICE_UNPLUG_GUEST_ERROR" if of == device => Some(Err(MonitorError::Refused(
                    "the guest keeps the device".to_owned(),
                ))),
                _ => None,
            }
        })
        .await
    }

    async fn wait_for<T>(
        &mut self,
        found: impl Fn(&Value) -> Option<Result<T, MonitorError>>,
    ) -> Result<T, MonitorError> {
        let waited = async {
            loop {
                let mut line = Vec::new();
                let mut limited = (&mut self.stream).take(ANSWER_MAX);
                if limited.read_until(b'\n', &mut line).await? == 0 {
                    return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                }
                let message: Value =
                    serde_json::from_slice(&line).map_err(|_| MonitorError::Answer)?;
                if let Some(result) = found(&message) {
                    return result;
                }
            }
        };
        tokio::time::timeout(PATIENCE, waited)
            .await
            .unwrap_or(Err(MonitorError::Silent))
    }
}

/// What a message says about the command with this number.
fn answered(message: &Value, id: u64) -> Option<Result<(), MonitorError>> {
    if message.get("id").and_then(Value::as_u64) != Some(id) {
        return None;
    }
    let Some(error) = message.get("error") else {
        return Some(Ok(()));
    };
    let text = error.get("desc").and_then(Value::as_str);
    Some(Err(MonitorError::Refused(
        text.unwrap_or("without a reason").to_owned(),
    )))
}

/// Sends one request over HTTP, on a connection of its own; the answer's body.
pub(super) async fn put(
    socket: &Path,
    target: &str,
    body: Option<&Value>,
) -> Result<Vec<u8>, MonitorError> {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "PUT {target} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await?;
        answer(BufReader::new(stream)).await
    };
    tokio::time::timeout(PATIENCE, exchange)
        .await
        .unwrap_or(Err(MonitorError::Silent))
}

async fn answer(stream: BufReader<UnixStream>) -> Result<Vec<u8>, MonitorError> {
    let mut stream = stream.take(ANSWER_MAX);
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status: u16 = status.ok_or(MonitorError::Answer)?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).await?;
        let Some((name, value)) = header.trim_end().split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().map_err(|_| MonitorError::Answer)?;
        }
    }
    if length > ANSWER_MAX {
        return Err(MonitorError::Answer);
    }
    let mut body = Vec::new();
    stream.take(length).read_to_end(&mut body).await?;
    if (200..300).contains(&status) {
        return Ok(body);
    }
    let text = String::from_utf8_lossy(&body);
    Err(MonitorError::Refused(format!("{status} {}", text.trim())))
}
