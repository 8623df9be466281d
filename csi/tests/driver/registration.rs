//! The sockets by which the kubelet finds the driver and calls it, and what it is known to have done.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use carport_proto::client::connect;
use carport_proto::pluginregistration::v1::registration_client::RegistrationClient;
use carport_proto::pluginregistration::v1::{InfoRequest, RegistrationStatus};

use super::testing::{self, World};
use super::{NAME, Node, NodeGetCapabilitiesRequest, request, wait_for};

/// What tidies up takes the driver away with it only until the driver notices.
#[test]
fn a_registration_socket_that_is_taken_away_comes_back() {
    testing::in_mount_namespace_async("a_registration_socket_comes_back", || async {
        let world = World::new(None);
        let node = Node::start(&world);
        let socket = node.config.registration().unwrap().to_owned();
        wait_for(&socket).await;
        for _ in 0..3 {
            fs::remove_file(&socket).unwrap();
            wait_for(&socket).await;
            assert_eq!(
                node.registration(),
                ("not called", None),
                "the kubelet does not know the new one"
            );
            let channel = connect(&socket).await.unwrap();
            let mut kubelet = RegistrationClient::new(channel);
            let info = kubelet.get_info(InfoRequest {}).await.unwrap();
            assert_eq!(info.into_inner().name, NAME);
            let status = RegistrationStatus { plugin_registered: true, error: String::new() };
            kubelet.notify_registration_status(status).await.unwrap();
            assert_eq!(node.registration(), ("registered", None));
        }
        // Nothing is left under another name, and nothing after the end.
        let folder = socket.parent().unwrap();
        assert_eq!(fs::read_dir(folder).unwrap().count(), 1);
        node.stop().await;
        assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
    });
}

/// A successor's socket is not ours to replace.
#[test]
fn a_registration_socket_that_another_agent_put_in_place_is_left_alone() {
    testing::in_mount_namespace_async("another_agents_registration_socket", || async {
        let world = World::new(None);
        let node = Node::start(&world);
        let socket = node.config.registration().unwrap().to_owned();
        wait_for(&socket).await;
        let other = socket.with_extension("other");
        let _listener = UnixListener::bind(&other).unwrap();
        fs::rename(&other, &socket).unwrap();
        let inode = fs::metadata(&socket).unwrap().ino();
        node.stop().await;
        assert_eq!(fs::metadata(&socket).unwrap().ino(), inode);
    });
}

/// Whether it comes to be so, which nobody reports.
async fn becomes(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn connections_without_a_call_are_told_from_none_and_end_with_the_first_call() {
    testing::in_mount_namespace_async("connections_without_a_call", || async {
        let world = World::new(None);
        let node = Node::start(&world);
        let socket = wait_for(node.config.registration().unwrap()).await;
        // Whoever looks whether the socket is served says nothing: `carport doctor`, for one.
        drop(UnixStream::connect(&socket).unwrap());
        for connections in 1..=2 {
            // Not HTTP/2: the server ends it.
            let sent = socket.clone();
            let ended = tokio::task::spawn_blocking(move || {
                let mut stream = UnixStream::connect(&sent).unwrap();
                stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
                let _ = stream.read_to_end(&mut Vec::new());
            });
            ended.await.unwrap();
            becomes("the connection is counted", || {
                use carport_csi::RegistrationState::NotUnderstood;
                let status = node.kubelet.borrow();
                matches!(&status.registration, NotUnderstood { connections: n, caller, .. }
                    if *n == connections && caller.ends_with(&format!("(process {})", std::process::id())))
            })
            .await;
        }
        let mut kubelet = RegistrationClient::new(connect(&socket).await.unwrap());
        kubelet.get_info(InfoRequest {}).await.unwrap();
        assert_eq!(node.registration(), ("asked", None));
        drop(kubelet);
        node.stop().await;
        assert!(!socket.exists());
    });
}

/// As the registration socket: the kubelet connects anew for each call.
#[test]
fn a_csi_socket_that_is_taken_away_comes_back_and_calls_under_way_do_not_notice() {
    testing::in_mount_namespace_async("a_csi_socket_comes_back", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights")]).await;
        let node = Node::start(&world);
        let socket = wait_for(node.config.endpoint()).await;
        let mut connected = node.node().await;
        connected.node_get_capabilities(NodeGetCapabilitiesRequest {}).await.unwrap();
        for round in 0..2 {
            match round {
                0 => fs::remove_file(&socket).unwrap(),
                // With its folder, as by who cleans up the kubelet's plugins.
                _ => fs::remove_dir_all(socket.parent().unwrap()).unwrap(),
            }
            let target = world.target(&format!("a{round}"));
            connected.node_publish_volume(request("csi-a", &target, &image)).await.unwrap();
            wait_for(&socket).await;
            node.unpublish("csi-a", &target).await.unwrap();
        }
        node.stop().await;
        assert!(!socket.exists());
    });
}
