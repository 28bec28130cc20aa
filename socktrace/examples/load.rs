//! A fixed load for measuring what tracing costs: `load N` makes N connections over loopback, one
//! thread, connect, accept, close with a reset, close; then prints the time it took by
//! CLOCK_MONOTONIC. Under `cargo xtask vm --icount` that time counts instructions.

use std::{
    error::Error,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};

fn main() -> Result<(), Box<dyn Error>> {
    let count: u32 = std::env::args().nth(1).ok_or("usage: load CONNECTIONS")?.parse()?;
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    listener.listen(128)?;
    let address = listener.local_addr()?;
    let run = |count: u32| -> Result<Duration, Box<dyn Error>> {
        let began = Instant::now();
        for _ in 0..count {
            let client = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            client.connect(&address)?;
            let (server, _) = listener.accept()?;
            client.set_linger(Some(Duration::ZERO))?;
            drop(client);
            drop(server);
        }
        Ok(began.elapsed())
    };
    run(count / 10)?;
    let taken = run(count)?;
    println!("{count} connections, {} ns each", taken.as_nanos() / u128::from(count.max(1)));
    Ok(())
}
