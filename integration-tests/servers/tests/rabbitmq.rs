//! RabbitMQ nodes start, die, freeze, restart with their data, and leave nothing behind.

use std::{net::UdpSocket, process::ExitCode, thread, time::Duration};

use common::{Done, Owned, Test, Victim};
use test_servers::{RabbitCluster, RabbitNode, rabbitmq_server};

mod common;

const TESTS: [Test; 4] = [
    ("what_was_declared_survives_a_kill", survives_a_kill),
    ("a_node_that_answers_late_is_asked_again", answers_late),
    ("nothing_is_left_when_the_owner_is_killed", owner_killed),
    ("a_cluster_of_three_has_three_nodes", cluster),
];

fn main() -> ExitCode {
    let owned = |node: &RabbitNode| Owned {
        pid: node.pid().unwrap_or(0),
        ports: ports(node).to_vec(),
        folder: node.folder().display().to_string(),
    };
    common::victim(RabbitNode::start, owned).unwrap_or_else(|| common::run(TESTS, &rabbitmq_server()))
}

fn ports(node: &RabbitNode) -> [u16; 3] {
    [node.port(), node.distribution_port(), node.epmd_port()]
}

fn survives_a_kill() -> Done {
    let node = RabbitNode::start()?;
    node.ctl(&["add_user", "alice", "secret"])?;
    let first = node.pid();
    node.kill()?;
    assert_eq!(node.pid(), None);
    for port in ports(&node) {
        // Whoever wants the port of a server takes the UDP port first.
        assert!(
            UdpSocket::bind(("127.0.0.1", port)).is_err(),
            "port {port} is given away"
        );
    }
    node.restart()?;
    assert_ne!(node.pid(), first);
    assert!(node.ctl(&["list_users"])?.contains("alice"));
    node.freeze();
    node.thaw();
    node.ctl(&["ping"])?;
    node.freeze();
    node.stop()?;
    let folder = node.folder().to_owned();
    drop(node);
    assert!(!folder.exists(), "{} is left behind", folder.display());
    Ok(())
}

fn answers_late() -> Done {
    // Erlang gives a connection 7 s, and no event reports when it gives up.
    const FROZEN: Duration = Duration::from_secs(20);
    let node = RabbitNode::start()?;
    node.freeze();
    thread::scope(|scope| {
        let asking = scope.spawn(|| node.ctl(&["ping"]));
        thread::sleep(FROZEN);
        node.thaw();
        asking.join().expect("no panic")
    })?;
    Ok(())
}

fn owner_killed() -> Done {
    Victim::start(1)?.kill()
}

fn cluster() -> Done {
    let cluster = RabbitCluster::start(3)?;
    let status = cluster.nodes()[2].ctl(&["cluster_status"])?;
    assert!(
        cluster.nodes().iter().all(|node| status.contains(node.name())),
        "{status}"
    );
    cluster.nodes()[1].kill()?;
    cluster.nodes()[1].restart()?;
    cluster.wait_complete()
}
