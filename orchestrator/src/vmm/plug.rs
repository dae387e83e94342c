//! Gives a running machine a device, and takes one away.

use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokio::net::UnixListener;

use super::monitor::{MonitorError, Qmp, put};
use super::{cloud_hypervisor, qemu, queues};
use crate::backend::{DISK_QUEUE_SIZE, QUEUE_SIZE};
use crate::plan::{BackendPlan, DevicePlan};
use crate::spec::VmmKind;
use crate::{Error, ErrorKind, MicrosandboxResult};

/// How a running VMM is told of devices.
#[derive(Debug, Default)]
pub(crate) struct Plug(Way);

#[derive(Debug, Default)]
enum Way {
    /// It has none.
    #[default]
    None,
    /// QEMU connects to this socket when it starts. Nobody listens before there is something to say.
    Called(StdUnixListener),
    /// QEMU's monitor.
    Qmp(Qmp),
    /// cloud-hypervisor listens here.
    Http(PathBuf),
}

impl Plug {
    /// What a VMM of this kind is told devices through. Must be called before it is started.
    pub(crate) fn prepare(vmm: VmmKind, sockets: &Path) -> MicrosandboxResult<Self> {
        Ok(Self(match vmm {
            VmmKind::Qemu => {
                let path = sockets.join(qemu::MONITOR);
                let socket = StdUnixListener::bind(&path).map_err(|error| {
                    Error::io(format!("cannot bind `{}`", path.display()), error)
                })?;
                Way::Called(socket)
            }
            VmmKind::CloudHypervisor => Way::Http(cloud_hypervisor::api(sockets)),
            VmmKind::Libkrun => Way::None,
        }))
    }

    /// Plugs in the device of `plan`, which is served on `socket`.
    pub(crate) async fn attach(
        &mut self,
        plan: &BackendPlan,
        socket: &Path,
    ) -> MicrosandboxResult<()> {
        let socket = socket.to_str().ok_or_else(|| {
            let message = format!("`{}` is not UTF-8", socket.display());
            Error::new(ErrorKind::InvalidConfig, message)
        })?;
        let attached = match self.way().await {
            Ok(Way::Qmp(qmp)) => attach_qemu(qmp, plan, socket).await,
            Ok(Way::Http(api)) => {
                let (verb, device) = described(plan, socket);
                let target = format!("/api/v1/vm.{verb}");
                put(api, &target, Some(&device)).await.map(drop)
            }
            Ok(Way::None | Way::Called(_)) => return Err(no_way()),
            Err(error) => Err(error),
        };
        attached.map_err(|error| failed("cannot plug the device in", error))
    }

    /// Takes the device of `plan` away. cloud-hypervisor closes the connection to its backend only
    /// when the guest has let it go, which the caller sees by the backend's end.
    pub(crate) async fn detach(&mut self, plan: &BackendPlan) -> MicrosandboxResult<()> {
        let detached = match self.way().await {
            Ok(Way::Qmp(qmp)) => detach_qemu(qmp, plan).await,
            Ok(Way::Http(api)) => {
                let id = json!({ "id": cloud_hypervisor::device_id(plan) });
                put(api, "/api/v1/vm.remove-device", Some(&id))
                    .await
                    .map(drop)
            }
            Ok(Way::None | Way::Called(_)) => return Err(no_way()),
            Err(error) => Err(error),
        };
        detached.map_err(|error| failed("cannot take the device away", error))
    }

    /// Asks a VMM that can be asked to end by itself; whether it said that it does.
    pub(crate) async fn shut_down(&mut self) -> bool {
        match &self.0 {
            Way::Http(api) => put(api, "/api/v1/vmm.shutdown", None).await.is_ok(),
            Way::None | Way::Called(_) | Way::Qmp(_) => false,
        }
    }

    /// The connection, made when it is needed for the first time.
    async fn way(&mut self) -> Result<&mut Way, MonitorError> {
        if let Way::Called(socket) = &self.0 {
            let socket = socket.try_clone()?;
            socket.set_nonblocking(true)?;
            let (stream, _) = UnixListener::from_std(socket)?.accept().await?;
            self.0 = Way::Qmp(Qmp::greet(stream).await?);
        }
        Ok(&mut self.0)
    }
}

async fn attach_qemu(qmp: &mut Qmp, plan: &BackendPlan, socket: &str) -> Result<(), MonitorError> {
    let chardev = qemu::chardev_id(plan);
    let mut connection = json!({
        "addr": { "type": "unix", "data": { "path": socket } },
        "server": false,
    });
    let mut device = json!({
        "id": qemu::device_id(plan),
        "bus": qemu::BUS,
        "chardev": chardev,
    });
    match plan.device {
        DevicePlan::Fs(_) => {
            device["driver"] = "vhost-user-fs-pci".into();
            device["tag"] = plan.id.as_str().into();
            device["queue-size"] = QUEUE_SIZE.into();
            device["num-request-queues"] = queues(&plan.device).into();
        }
        DevicePlan::Blk(_) => {
            connection["reconnect"] = 1.into();
            device["driver"] = "vhost-user-blk-pci".into();
            device["queue-size"] = DISK_QUEUE_SIZE.into();
            device["num-queues"] = queues(&plan.device).into();
        }
    }
    let backend = json!({ "type": "socket", "data": connection });
    qmp.execute("chardev-add", json!({ "id": chardev, "backend": backend }))
        .await?;
    let added = qmp.execute("device_add", device).await;
    if added.is_err() {
        // The first error is the one that tells what is wrong.
        let _ = qmp
            .execute("chardev-remove", json!({ "id": chardev }))
            .await;
    }
    added
}

async fn detach_qemu(qmp: &mut Qmp, plan: &BackendPlan) -> Result<(), MonitorError> {
    qmp.unplug(&qemu::device_id(plan)).await?;
    let chardev = json!({ "id": qemu::chardev_id(plan) });
    qmp.execute("chardev-remove", chardev).await
}

/// cloud-hypervisor's verb and description of a device.
fn described(plan: &BackendPlan, socket: &str) -> (&'static str, Value) {
    let id = cloud_hypervisor::device_id(plan);
    let count = queues(&plan.device);
    match plan.device {
        DevicePlan::Fs(_) => (
            "add-fs",
            json!({
                "id": id,
                "tag": plan.id,
                "socket": socket,
                "num_queues": count,
                "queue_size": QUEUE_SIZE,
            }),
        ),
        DevicePlan::Blk(_) => (
            "add-disk",
            json!({
                "id": id,
                "vhost_user": true,
                "vhost_socket": socket,
                "num_queues": count,
                "queue_size": DISK_QUEUE_SIZE,
            }),
        ),
    }
}

fn no_way() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "this VMM cannot be given devices while it runs",
    )
}

fn failed(what: &str, error: MonitorError) -> Error {
    Error::new(ErrorKind::BootStart, what).with_source(error)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;

    use expect_test::{Expect, expect};

    use super::*;
    use crate::vmm::tests::mounts;

    /// Speaks cloud-hypervisor's API: says what it was asked, and answers with `status`.
    fn http(
        socket: UnixListener,
        status: &'static str,
        times: usize,
    ) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut heard = String::new();
            for _ in 0..times {
                let (stream, _) = socket.accept().unwrap();
                let mut stream = BufReader::new(stream);
                let mut length = 0;
                let mut first = String::new();
                stream.read_line(&mut first).unwrap();
                loop {
                    let mut line = String::new();
                    stream.read_line(&mut line).unwrap();
                    if let Some(value) = line.strip_prefix("Content-Length: ") {
                        length = value.trim().parse().unwrap();
                    }
                    if line == "\r\n" {
                        break;
                    }
                }
                let mut body = vec![0; length];
                stream.read_exact(&mut body).unwrap();
                heard.push_str(&format!(
                    "{} {}\n",
                    first.trim_end(),
                    String::from_utf8(body).unwrap()
                ));
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 5\r\n\r\nwhy\r\n");
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
            heard
        })
    }

    /// Is QEMU: greets, takes what it is told, sends an event before some answers.
    fn qemu(
        mut stream: UnixStream,
        answers: &'static [&'static str],
    ) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut heard = String::new();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            stream.write_all(b"{\"QMP\": {}}\n").unwrap();
            for answer in answers {
                let command = lines.next().unwrap().unwrap();
                heard.push_str(&command);
                heard.push('\n');
                stream.write_all(answer.as_bytes()).unwrap();
            }
            heard
        })
    }

    async fn both_ways(plug: &mut Plug) {
        for (number, plan) in mounts().iter().enumerate() {
            let socket = PathBuf::from(format!("/run/s/d{number}"));
            plug.attach(plan, &socket).await.unwrap();
            plug.detach(plan).await.unwrap();
        }
    }

    fn run(work: impl Future<Output = ()>) {
        let events = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        events.block_on(work);
    }

    fn check(heard: thread::JoinHandle<String>, expected: &Expect) {
        expected.assert_eq(heard.join().unwrap().trim_end());
    }

    #[test]
    fn cloud_hypervisor_is_asked_over_http() {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(dir.path().join("api")).unwrap();
        let heard = http(socket, "204 No Content", 5);
        let mut plug = Plug::prepare(VmmKind::CloudHypervisor, dir.path()).unwrap();
        run(async {
            both_ways(&mut plug).await;
            assert!(plug.shut_down().await);
        });
        check(
            heard,
            &expect![[r#"
                PUT /api/v1/vm.add-fs HTTP/1.1 {"id":"m-share_1","num_queues":2,"queue_size":1024,"socket":"/run/s/d0","tag":"share_1"}
                PUT /api/v1/vm.remove-device HTTP/1.1 {"id":"m-share_1"}
                PUT /api/v1/vm.add-disk HTTP/1.1 {"id":"m-disk_2","num_queues":1,"queue_size":256,"vhost_socket":"/run/s/d1","vhost_user":true}
                PUT /api/v1/vm.remove-device HTTP/1.1 {"id":"m-disk_2"}
                PUT /api/v1/vmm.shutdown HTTP/1.1"#]],
        );
    }

    #[test]
    fn what_cloud_hypervisor_refuses_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(dir.path().join("api")).unwrap();
        let heard = http(socket, "500 Internal Server Error", 2);
        let mut plug = Plug::prepare(VmmKind::CloudHypervisor, dir.path()).unwrap();
        run(async {
            let error = plug.detach(&mounts()[0]).await.unwrap_err();
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert_eq!(cause, "the VMM refuses: 500 why");
            assert!(!plug.shut_down().await);
        });
        heard.join().unwrap();
    }

    #[test]
    fn qemu_is_asked_over_its_monitor_when_there_is_something_to_ask() {
        let dir = tempfile::tempdir().unwrap();
        let mut plug = Plug::prepare(VmmKind::Qemu, dir.path()).unwrap();
        let stream = UnixStream::connect(dir.path().join(qemu::MONITOR)).unwrap();
        let heard = qemu(
            stream,
            &[
                "{\"return\": {}, \"id\": 1}\n",
                "{\"return\": {}, \"id\": 2}\n",
                "{\"event\": \"RESUME\"}\n{\"return\": {}, \"id\": 3}\n",
                "{\"return\": {}, \"id\": 4}\n{\"event\": \"DEVICE_DELETED\", \"data\": {\"path\": \"/x\"}}\n\
                 {\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"m-share_1\"}}\n",
                "{\"return\": {}, \"id\": 5}\n",
                "{\"return\": {}, \"id\": 6}\n",
                "{\"return\": {}, \"id\": 7}\n",
                "{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"m-disk_2\"}}\n{\"return\": {}, \"id\": 8}\n",
                "{\"return\": {}, \"id\": 9}\n",
            ],
        );
        run(both_ways(&mut plug));
        check(
            heard,
            &expect![[r#"
                {"arguments":{},"execute":"qmp_capabilities","id":1}
                {"arguments":{"backend":{"data":{"addr":{"data":{"path":"/run/s/d0"},"type":"unix"},"server":false},"type":"socket"},"id":"c-share_1"},"execute":"chardev-add","id":2}
                {"arguments":{"bus":"plug","chardev":"c-share_1","driver":"vhost-user-fs-pci","id":"m-share_1","num-request-queues":2,"queue-size":1024,"tag":"share_1"},"execute":"device_add","id":3}
                {"arguments":{"id":"m-share_1"},"execute":"device_del","id":4}
                {"arguments":{"id":"c-share_1"},"execute":"chardev-remove","id":5}
                {"arguments":{"backend":{"data":{"addr":{"data":{"path":"/run/s/d1"},"type":"unix"},"reconnect":1,"server":false},"type":"socket"},"id":"c-disk_2"},"execute":"chardev-add","id":6}
                {"arguments":{"bus":"plug","chardev":"c-disk_2","driver":"vhost-user-blk-pci","id":"m-disk_2","num-queues":1,"queue-size":256},"execute":"device_add","id":7}
                {"arguments":{"id":"m-disk_2"},"execute":"device_del","id":8}
                {"arguments":{"id":"c-disk_2"},"execute":"chardev-remove","id":9}"#]],
        );
    }

    #[test]
    fn a_device_that_qemu_does_not_take_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut plug = Plug::prepare(VmmKind::Qemu, dir.path()).unwrap();
        let stream = UnixStream::connect(dir.path().join(qemu::MONITOR)).unwrap();
        let heard = qemu(
            stream,
            &[
                "{\"return\": {}, \"id\": 1}\n",
                "{\"return\": {}, \"id\": 2}\n",
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no slot\"}, \"id\": 3}\n",
                "{\"return\": {}, \"id\": 4}\n",
            ],
        );
        run(async {
            let attached = plug.attach(&mounts()[1], Path::new("/run/s/d1")).await;
            let error = attached.unwrap_err();
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert_eq!(cause, "the VMM refuses: no slot");
        });
        let heard = heard.join().unwrap();
        let last = heard.lines().last().unwrap();
        assert!(last.contains("chardev-remove"), "{heard}");
    }
}
