//! The proxy cuts where a test asks it to.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Trial};
use test_servers::{Cut, Error, Proxy, RedisServer, redis_server};

const LIMIT: Duration = Duration::from_secs(60);

type Done = Result<(), Error>;
type Test = (&'static str, fn() -> Done);

const TESTS: [Test; 6] = [
    ("before_the_request_nothing_was_done", before_request),
    ("before_the_reply_it_was_done", before_reply),
    ("a_pattern_in_pieces_is_found", in_pieces),
    ("cut_closes_and_new_connections_work", cut),
    ("refused_connections_are_closed", refuse),
    ("what_was_held_passes_afterwards", hold),
];

fn main() -> ExitCode {
    let trials = TESTS.into_iter().map(|(name, test)| match redis_server() {
        Ok(_) => Trial::test(name, move || test().map_err(Into::into)),
        Err(why) => Trial::test(name, || Ok(())).with_kind(why).with_ignored_flag(true),
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

struct Setup {
    server: RedisServer,
    proxy: Proxy,
}

fn setup() -> Result<Setup, Error> {
    let server = RedisServer::durable().start()?;
    let proxy = Proxy::start(server.port())?;
    Ok(Setup { server, proxy })
}

impl Setup {
    fn connect(&self) -> Result<TcpStream, Error> {
        let stream = TcpStream::connect(("127.0.0.1", self.proxy.port()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    }

    fn count(&self) -> Result<String, Error> {
        Ok(self.server.command(&["GET", "n"])?.text().to_owned())
    }
}

/// The reply's line. Empty if the connection was closed.
fn ask(stream: &mut TcpStream, request: &str) -> Result<String, Error> {
    stream.write_all(request.as_bytes())?;
    let mut reply = [0; 100];
    match stream.read(&mut reply) {
        Ok(read) => Ok(String::from_utf8_lossy(&reply[..read]).trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(String::new()),
        Err(error) => Err(error.into()),
    }
}

fn before_request() -> Done {
    let setup = setup()?;
    let mut stream = setup.connect()?;
    assert_eq!(ask(&mut stream, "INCR n\r\n")?, ":1");
    setup.proxy.cut_at(b"INCR", Cut::BeforeRequest);
    assert_eq!(ask(&mut stream, "PING\r\n")?, "+PONG");
    assert_eq!(setup.proxy.fired(), 0);
    assert_eq!(ask(&mut stream, "INCR n\r\n")?, "");
    assert!(setup.proxy.wait_fired(1, LIMIT));
    assert_eq!(setup.count()?, "1");
    assert_eq!(ask(&mut setup.connect()?, "INCR n\r\n")?, ":2"); // only once
    Ok(())
}

fn before_reply() -> Done {
    let setup = setup()?;
    let mut stream = setup.connect()?;
    assert_eq!(ask(&mut stream, "INCR n\r\n")?, ":1");
    setup.proxy.cut_at(b"INCR", Cut::BeforeReply);
    assert_eq!(ask(&mut stream, "INCR n\r\n")?, "");
    assert!(setup.proxy.wait_fired(1, LIMIT));
    assert_eq!(setup.count()?, "2");
    assert_eq!(ask(&mut setup.connect()?, "INCR n\r\n")?, ":3");
    assert_eq!(setup.proxy.fired(), 1);
    Ok(())
}

fn in_pieces() -> Done {
    let setup = setup()?;
    let mut stream = setup.connect()?;
    stream.set_nodelay(true)?;
    setup.proxy.cut_at(b"INCR n", Cut::BeforeReply);
    for piece in ["SET a 1\r\nIN", "CR", " "] {
        stream.write_all(piece.as_bytes())?;
        // The reply to the first piece proves that it was forwarded on its own.
        if piece.len() > 2 {
            assert_eq!(ask(&mut stream, "")?, "+OK");
        }
    }
    assert_eq!(ask(&mut stream, "n\r\n")?, "");
    assert!(setup.proxy.wait_fired(1, LIMIT));
    assert_eq!(setup.count()?, "1");
    Ok(())
}

fn cut() -> Done {
    let setup = setup()?;
    let mut stream = setup.connect()?;
    assert_eq!(ask(&mut stream, "PING\r\n")?, "+PONG");
    setup.proxy.cut();
    assert_eq!(ask(&mut stream, "")?, "");
    assert_eq!(ask(&mut setup.connect()?, "PING\r\n")?, "+PONG");
    let port = setup.proxy.port();
    drop(setup.proxy);
    // Another case may be starting its server: until the new process runs its program, it holds a
    // copy of the socket that listened.
    let given_up = Instant::now() + LIMIT;
    while TcpStream::connect(("127.0.0.1", port)).is_ok() {
        assert!(Instant::now() < given_up, "a dropped proxy still listens");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn refuse() -> Done {
    let setup = setup()?;
    let mut before = setup.connect()?;
    assert_eq!(ask(&mut before, "PING\r\n")?, "+PONG");
    setup.proxy.refuse(true);
    assert_eq!(ask(&mut setup.connect()?, "")?, "");
    assert_eq!(ask(&mut before, "PING\r\n")?, "+PONG");
    setup.proxy.refuse(false);
    assert_eq!(ask(&mut setup.connect()?, "PING\r\n")?, "+PONG");
    Ok(())
}

fn hold() -> Done {
    let setup = setup()?;
    let mut stream = setup.connect()?;
    assert_eq!(ask(&mut stream, "INCR n\r\n")?, ":1");
    setup.proxy.hold(true);
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    assert!(ask(&mut stream, "INCR n\r\n").is_err(), "a reply came through");
    assert_eq!(setup.count()?, "1");
    setup.proxy.hold(false);
    stream.set_read_timeout(Some(LIMIT))?;
    assert_eq!(ask(&mut stream, "")?, ":2");
    Ok(())
}
