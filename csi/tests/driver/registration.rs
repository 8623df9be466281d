//! The socket by which the kubelet finds the driver.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;

use carport_csi::RegistrationState;
use carport_proto::client::connect;
use carport_proto::pluginregistration::v1::registration_client::RegistrationClient;
use carport_proto::pluginregistration::v1::{InfoRequest, RegistrationStatus};

use super::testing::{self, World};
use super::{NAME, Node, wait_for};

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
            assert_eq!(*node.registration.borrow(), RegistrationState::Waiting, "for the kubelet");
            let channel = connect(&socket).await.unwrap();
            let mut kubelet = RegistrationClient::new(channel);
            let info = kubelet.get_info(InfoRequest {}).await.unwrap();
            assert_eq!(info.into_inner().name, NAME);
            let status = RegistrationStatus { plugin_registered: true, error: String::new() };
            kubelet.notify_registration_status(status).await.unwrap();
            assert_eq!(*node.registration.borrow(), RegistrationState::Registered);
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
