//! The API over TCP: who gets in, and what they may do.

use std::path::{Path, PathBuf};
use std::process::Command;

use carport_proto::carport::v1;
use carport_proto::carport::v1::cache_service_client::CacheServiceClient;
use carport_proto::carport::v1::locality_service_client::LocalityServiceClient;
use carport_proto::client::{Bearer, Tls, connect_tls};
use tonic::Code;
use tonic::transport::Channel;

use crate::support::{Agent, Home, comes, eventually, stdout};

fn openssl(folder: &Path, arguments: &str) {
    let output =
        Command::new("openssl").current_dir(folder).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A CA, and certificates `agent` (for localhost) and `caller` of it; nothing without openssl.
fn certificates(home: &Home) -> Option<PathBuf> {
    if Command::new("openssl").arg("version").output().is_err() {
        eprintln!("SKIPPED: certificates need openssl");
        return None;
    }
    let folder = home.path("tls");
    std::fs::create_dir(&folder).unwrap();
    authority(&folder, "ca");
    certificate(&folder, "agent", "ca");
    certificate(&folder, "caller", "ca");
    Some(folder)
}

fn authority(folder: &Path, name: &str) {
    openssl(
        folder,
        &format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj \
             /CN={name} -keyout {name}.key -out {name}.crt"
        ),
    );
}

fn certificate(folder: &Path, name: &str, ca: &str) {
    std::fs::write(folder.join("ext"), "subjectAltName=DNS:localhost\n").unwrap();
    openssl(
        folder,
        &format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={name} -keyout \
             {name}.key -out {name}.csr"
        ),
    );
    openssl(
        folder,
        &format!(
            "x509 -req -in {name}.csr -CA {ca}.crt -CAkey {ca}.key -CAcreateserial -days 2 \
             -extfile ext -out {name}.new"
        ),
    );
    std::fs::rename(folder.join(format!("{name}.new")), folder.join(format!("{name}.crt")))
        .unwrap();
}

/// An agent on a free port; its address.
fn serving(home: &Home, tls: &Path, more: &str) -> (Agent, String) {
    let tls = tls.display();
    let config = format!(
        "api:\n  tcp:\n    listen: 127.0.0.1:0\n    certificate: {tls}/agent.crt\n    key: \
         {tls}/agent.key\n{more}"
    );
    std::fs::write(home.path("config.yaml"), config).unwrap();
    let agent = home.agent(&[]);
    let port = agent.tcp.clone().unwrap().rsplit(':').next().unwrap().to_string();
    (agent, format!("localhost:{port}"))
}

fn tls(folder: &Path, caller: Option<&str>) -> Tls {
    let file = |name: &str| folder.join(name);
    let identity = caller.map(|name| (file(&format!("{name}.crt")), file(&format!("{name}.key"))));
    Tls { ca: file("ca.crt"), identity, server_name: None }
}

async fn read(channel: Channel) -> Code {
    let mut client = LocalityServiceClient::new(channel);
    client.get_node(v1::GetNodeRequest::default()).await.err().map_or(Code::Ok, |e| e.code())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_the_callers_authority_lets_in_and_a_new_one_is_taken_up() {
    let home = Home::new();
    let Some(folder) = certificates(&home) else { return };
    let more = format!("    clientCa: {}/ca.crt\n", folder.display());
    let (agent, address) = serving(&home, &folder, &more);
    let connect = |caller| connect_tls(&address, &tls(&folder, caller)).unwrap();
    assert_eq!(read(connect(Some("caller"))).await, Code::Ok);
    assert_ne!(read(connect(None)).await, Code::Ok, "nobody without a certificate");
    let mut cache = CacheServiceClient::new(connect(Some("caller")));
    let evict = v1::EvictRequest { model: None, ..Default::default() };
    let refused = cache.evict(evict).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("api.tcp.writes"), "{}", refused.message());

    // Another authority: the agent's new certificate is seen by those who trust that one alone.
    authority(&folder, "other");
    certificate(&folder, "agent", "other");
    let other = Tls { ca: folder.join("other.crt"), ..tls(&folder, Some("caller")) };
    let look =
        async || (read(connect_tls(&address, &other).unwrap()).await == Code::Ok).then_some(());
    comes("the new certificate is taken up", look).await;
    tokio::task::spawn_blocking(move || agent.terminate()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_lets_in_as_far_as_it_says() {
    let home = Home::new();
    let Some(folder) = certificates(&home) else { return };
    let tokens = "reader-0123456789 sched read\nwriter-0123456789 ops write\n";
    std::fs::write(folder.join("tokens"), tokens).unwrap();
    let more = format!("    tokens: {}/tokens\n    writes: true\n", folder.display());
    let (agent, address) = serving(&home, &folder, &more);
    let channel = connect_tls(&address, &tls(&folder, None)).unwrap();
    assert_eq!(read(channel.clone()).await, Code::Unauthenticated);
    for (token, reads, writes) in [
        ("reader-0123456789", Code::Ok, Code::PermissionDenied),
        // The request itself is wrong, and gets that far.
        ("writer-0123456789", Code::Ok, Code::InvalidArgument),
        ("stranger-0123456789", Code::Unauthenticated, Code::Unauthenticated),
    ] {
        let bearer = Bearer::new(token).unwrap();
        let mut locality = LocalityServiceClient::with_interceptor(channel.clone(), bearer.clone());
        let answer = locality.get_node(v1::GetNodeRequest::default()).await;
        assert_eq!(answer.err().map_or(Code::Ok, |e| e.code()), reads, "{token}");
        let mut cache = CacheServiceClient::with_interceptor(channel.clone(), bearer);
        let answer = cache.evict(v1::EvictRequest::default()).await;
        assert_eq!(answer.unwrap_err().code(), writes, "{token}");
    }
    // The commands come that way, too.
    let ca = folder.join("ca.crt").display().to_string();
    let [reader, writer, stranger] = ["reader", "writer", "stranger"].map(|name| {
        std::fs::write(folder.join(name), format!("{name}-0123456789\n")).unwrap();
        folder.join(name).display().to_string()
    });
    let over = |token, command: &[_]| {
        let more: [&str; 6] = ["--address", &address, "--tls-ca", &ca, "--token-file", token];
        [command, &more].concat()
    };
    let named = home.image("a", &[("w.bin", "12345")]);
    tokio::task::block_in_place(|| {
        assert_eq!(home.json(&over(&reader, &["status"]))["node_name"], "node-1");
        home.fails(&over(&stranger, &["status"]));
        home.fails(&over(&reader, &["prefetch", &named]));
        let asked = home.json(&over(&writer, &["prefetch", &named]));
        assert_eq!(asked[0]["reference"], named.as_str());
        eventually("the model", || {
            let located = home.json(&over(&reader, &["locate", &named]));
            (located[0]["score"] == 100).then_some(())
        });
        let watched = stdout(&home.run(&over(&reader, &["watch", "--once"])));
        assert!(watched.ends_with("synced\n") && watched.contains(&named), "{watched}");
        let nobody = ["status", "--address", "127.0.0.1:9", "--tls-ca", &ca];
        let error = home.fails(&nobody);
        assert!(error.contains("onnection refused"), "{error}");
    });
    // Without TLS nothing is said at all.
    let port = address.rsplit(':').next().unwrap().to_string();
    let plain = std::net::TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    drop(plain);
    tokio::task::spawn_blocking(move || agent.terminate()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_keeps_out_no_caller_and_is_closed() {
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: own.maximum, ..own };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let home = Home::new();
    let Some(folder) = certificates(&home) else { return };
    std::fs::write(folder.join("tokens"), "reader-0123456789 sched read\n").unwrap();
    let more = format!("    tokens: {}/tokens\n", folder.display());
    let (agent, address) = serving(&home, &folder, &more);
    let to: std::net::SocketAddr = agent.tcp.as_ref().unwrap().parse().unwrap();
    let mut silent = Vec::new();
    for n in 0..1_100 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        // Another peer than this machine, as which callers come.
        socket.bind(([127, 0, 1, u8::try_from(n % 10).unwrap()], 0).into()).unwrap();
        silent.push(socket.connect(to).await.unwrap());
    }
    let bearer = Bearer::new("reader-0123456789").unwrap();
    let channel = connect_tls(&address, &tls(&folder, None)).unwrap();
    let mut locality = LocalityServiceClient::with_interceptor(channel, bearer);
    let answer = locality.get_node(v1::GetNodeRequest::default());
    let answer = tokio::time::timeout(std::time::Duration::from_secs(5), answer).await;
    answer.expect("served while others say nothing").unwrap();
    let (_, metrics) = agent.get("/metrics");
    let refused = "carport_connections_refused_total{listener=\"api_tcp\",reason=\"limit\"} ";
    let refused = metrics.lines().find_map(|line| line.strip_prefix(refused)).unwrap();
    assert!(refused.parse::<u32>().unwrap() > 0, "{refused}");
    for mut stream in silent {
        use tokio::io::AsyncReadExt as _;
        let mut byte = [0];
        let ended = tokio::time::timeout(crate::support::PATIENCE, stream.read(&mut byte)).await;
        assert!(matches!(ended.expect("it is closed"), Ok(0) | Err(_)));
    }
    tokio::task::spawn_blocking(move || agent.terminate()).await.unwrap();
}

#[test]
fn tcp_without_tls_or_without_asking_who_calls_is_refused() {
    let home = Home::new();
    for (text, part) in [
        ("{listen: '127.0.0.1:0'}", "api.tcp.certificate"),
        ("{listen: '127.0.0.1:0', certificate: /a, key: /b}", "api.tcp.clientCa"),
        ("{listen: '127.0.0.1:0', certificate: /a, key: /b, tokens: /c}", "/a"),
    ] {
        std::fs::write(home.path("config.yaml"), format!("api: {{tcp: {text}}}\n")).unwrap();
        let error = home.fails(&["agent", "--csi", "false", "--http-listen", "127.0.0.1:0"]);
        assert!(error.contains(part), "{error}");
    }
    assert!(!home.socket().exists());
}
