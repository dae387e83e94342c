//! Stands in for a VMM and the agent in it: connects as both would, so that no guest is booted.
//!
//! It takes QEMU's command line and reads only the paths of the sockets from it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use msb_protocol::{Decoder, ExitStatus, Frame, FromAgent, PROTOCOL_VERSION, ToAgent};

fn main() -> Result<()> {
    let sockets: Vec<String> = std::env::args()
        .filter_map(|word| Some(word.strip_prefix("socket,")?.to_owned()))
        .collect();
    let path = |options: &String| {
        let path = options
            .split(',')
            .find_map(|option| option.strip_prefix("path="));
        path.map(str::to_owned)
    };
    let (agents, devices): (Vec<_>, Vec<_>) = sockets
        .into_iter()
        .partition(|options| options.contains("id=agent"));
    // Held until the end, as a VMM does.
    let _devices: Vec<UnixStream> = devices
        .iter()
        .filter_map(path)
        .map(UnixStream::connect)
        .collect::<std::io::Result<_>>()
        .context("connecting to a backend")?;
    let Some(agent) = agents.iter().find_map(path) else {
        return Ok(());
    };
    serve(UnixStream::connect(agent).context("connecting as the agent")?)
}

/// Is an agent that mounts nothing and whose commands all end at once.
fn serve(mut port: UnixStream) -> Result<()> {
    let kernel = "none".to_owned();
    say(
        &mut port,
        0,
        &FromAgent::Hello {
            version: PROTOCOL_VERSION,
            kernel,
        },
    )?;
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = port.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        decoder.feed(buffer.get(..count).unwrap_or_default());
        while let Some(frame) = decoder.next_frame()? {
            let Ok(message) = frame.message::<ToAgent>() else {
                continue;
            };
            match message {
                ToAgent::Boot(_) => say(&mut port, 0, &FromAgent::Ready { uptime_ms: 0 })?,
                ToAgent::Exec(_) => {
                    say(
                        &mut port,
                        frame.channel,
                        &FromAgent::Exited(ExitStatus::Code(0)),
                    )?;
                }
                ToAgent::Shutdown { .. } => return say(&mut port, 0, &FromAgent::Goodbye),
                _ => {}
            }
        }
    }
}

fn say(port: &mut UnixStream, channel: u32, message: &FromAgent) -> Result<()> {
    Ok(port.write_all(&Frame::control(channel, message)?.encode())?)
}
