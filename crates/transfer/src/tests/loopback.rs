use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tonic::Code;

use super::*;

#[tokio::test]
async fn a_whole_transfer_arrives_and_is_committed_once() {
    let (there, here) = (There::start("life-1").await, Here::full());
    let lease = there.reserve();
    let mut claim = there.receiver.claim(lease, &key()).unwrap();
    let report = here.push(&there, lease).await.unwrap();
    assert_eq!((report.bytes, report.streams), (plan().bytes(), 1));
    claim.sealed().await.unwrap();
    let (blocks, bytes) = claim.commit().unwrap();
    assert_eq!(bytes, plan().bytes());
    here.assert_arrived(&there);
    assert_eq!((there.receiver.leases(), there.out()), (0, 3));
    drop(blocks);
    assert_eq!(there.out(), 0);
    assert_eq!(
        there.receiver.claim(lease, &key()).err(),
        Some(Refusal::Committed)
    );
    there.stop().await;
}

#[tokio::test]
async fn layers_leave_as_they_fill() {
    let (there, here) = (There::start("life-1").await, Here::new());
    let lease = there.reserve();
    let mut claim = there.receiver.claim(lease, &key()).unwrap();
    let filling = async {
        for end in [8, 13, 20] {
            for layer in 0..3 {
                here.fill(layer..layer + 1, end);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    };
    let (report, ()) = tokio::join!(here.push(&there, lease), filling);
    assert_eq!(report.unwrap().bytes, plan().bytes());
    claim.sealed().await.unwrap();
    here.assert_arrived(&there);
    there.stop().await;
}

#[tokio::test]
async fn a_sequence_that_ends_before_it_is_filled_seals_nothing() {
    let (there, mut here) = (There::start("life-1").await, Here::new());
    here.fill(0..3, 8);
    let lease = there.reserve();
    let address = there.address.to_string();
    let channel = Channels::new(crate::tcp()).get(&address).unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let transfer = Transfer {
        sent: Arc::new(move |bytes| {
            count.fetch_add(bytes as usize, Ordering::SeqCst);
        }),
        ..here.transfer(&address, there.identity(lease))
    };
    let filled = std::mem::replace(&mut here.filled, watch::Sender::new(Watermarks::new(3)));
    let pushing = push(channel, transfer);
    let (result, ()) = tokio::join!(pushing, async { drop(filled) });
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    let left = sent.load(Ordering::SeqCst);
    assert_eq!(left, GEOMETRY.block_bytes(), "what left is counted");
    assert!(there.receiver.release(lease));
    assert_eq!((there.receiver.leases(), there.out()), (0, 0));
    there.stop().await;
}

#[tokio::test]
async fn a_restarted_receiver_at_the_same_address_refuses_what_was_meant_for_its_past() {
    let first = There::start("life-1").await;
    let (address, identity) = (first.address, first.identity(first.reserve()));
    first.stop().await;
    let second = There::start_at("life-2", address).await;
    let lease = second.reserve();
    assert_eq!(lease, identity.lease, "the same number, another lease");
    let here = Here::full();
    let result = here.push_to(&address.to_string(), identity).await;
    let Err(Error::Peer { status, .. }) = result else {
        panic!("{result:?}")
    };
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("another incarnation"), "{status}");
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_sender_that_dies_leaves_a_lease_that_expires() {
    let there = There::start("life-1").await;
    let lease = there.reserve();
    let mut session = there.receiver.session();
    session.open(&there.identity(lease)).await.unwrap();
    let piece = crate::Piece {
        block: 0,
        first_layer: 0,
        layers: 1,
        tokens: 8,
    };
    session.piece(piece, 1, 128).unwrap();
    session.bytes(&[1; 100], false).unwrap();
    tokio::time::advance(TTL).await;
    there.receiver.sweep();
    // The lease is over, but its blocks are not free while somebody may still write them.
    assert_eq!((there.receiver.leases(), there.out()), (1, 3));
    assert!(session.stopped().is_cancelled());
    drop(session);
    assert_eq!((there.receiver.leases(), there.out()), (0, 0));
    let ended = there.receiver.claim(lease, &key()).err();
    assert_eq!(ended, Some(Refusal::Ended(Ended::Expired)));
    there.stop().await;
}

#[tokio::test]
async fn a_new_stream_waits_for_the_writer_before_it() {
    let there = There::start("life-1").await;
    let lease = there.reserve();
    let identity = there.identity(lease);
    let mut old = there.receiver.session();
    old.open(&identity).await.unwrap();
    let piece = crate::Piece {
        block: 0,
        first_layer: 0,
        layers: 1,
        tokens: 8,
    };
    old.piece(piece, 1, 128).unwrap();
    let stopped = old.stopped();
    let mut new = there.receiver.session();
    let opening = new.open(&identity);
    tokio::pin!(opening);
    assert!(futures::poll!(opening.as_mut()).is_pending());
    assert!(stopped.is_cancelled(), "the old stream is told to stop");
    drop(old);
    assert_eq!(opening.await.unwrap(), [0, 0, 0]);
    there.stop().await;
}

#[tokio::test]
async fn dropping_a_claim_gives_the_blocks_back() {
    let there = There::start("life-1").await;
    let lease = there.reserve();
    drop(there.receiver.claim(lease, &key()).unwrap());
    assert_eq!((there.receiver.leases(), there.out()), (0, 0));
    assert!(!there.receiver.release(lease), "it had ended");
    there.stop().await;
}

/// A TCP proxy to `to` that breaks each of its first connections after so many bytes towards the receiver.
async fn breaking_proxy(to: SocketAddr, breaks: Vec<usize>) -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut breaks = breaks.into_iter();
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let limit = breaks.next().unwrap_or(usize::MAX);
            // Whatever ends it, both connections close when this returns.
            let _ = relay(client, to, limit).await;
        }
    });
    (address, tasks)
}

async fn relay(client: TcpStream, to: SocketAddr, limit: usize) -> io::Result<()> {
    let server = TcpStream::connect(to).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = async {
        let mut left = limit;
        let mut buffer = [0; 64];
        while left > 0 {
            let most = left.min(buffer.len());
            let read = from_client.read(&mut buffer[..most]).await?;
            if read == 0 {
                break;
            }
            to_server.write_all(&buffer[..read]).await?;
            left -= read;
        }
        io::Result::Ok(())
    };
    let down = tokio::io::copy(&mut from_server, &mut to_client);
    tokio::select! { result = up => result, result = down => result.map(drop) }
}

#[tokio::test]
async fn a_broken_stream_resumes_with_what_is_missing() {
    let (there, here) = (There::start("life-1").await, Here::full());
    let total = plan().bytes() as usize;
    // The connections break at these bytes: in the handshake, in headers and in payloads.
    for breaks in [
        vec![30],
        vec![400, 700],
        vec![600, 600, 600],
        vec![total, 900],
    ] {
        let lease = there.reserve();
        let (proxy, tasks) = breaking_proxy(there.address, breaks.clone()).await;
        let mut claim = there.receiver.claim(lease, &key()).unwrap();
        let report = here
            .push_to(&proxy.to_string(), there.identity(lease))
            .await
            .unwrap();
        assert!(report.streams > 1, "{breaks:?}: {report:?}");
        claim.sealed().await.unwrap();
        let (blocks, _) = claim.commit().unwrap();
        here.assert_arrived(&there);
        drop(blocks);
        drop(tasks);
    }
    assert_eq!((there.receiver.leases(), there.out()), (0, 0));
    there.stop().await;
}

#[tokio::test]
async fn a_receiver_that_is_gone_fails_the_push_within_its_tries() {
    let there = There::start("life-1").await;
    let (identity, address) = (there.identity(there.reserve()), there.address.to_string());
    there.stop().await;
    let here = Here::full();
    let result = here.push_to(&address, identity).await;
    let Err(error @ Error::Peer { .. }) = result else {
        panic!("{result:?}")
    };
    assert_eq!(error.reason(), "unavailable");
}
