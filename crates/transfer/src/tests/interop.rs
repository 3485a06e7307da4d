//! The hand-made ends against plain tonic and prost ones: the wire is ordinary gRPC.

use proto::v1::{
    self, PushRequest, PushResponse,
    kv_transfer_client::KvTransferClient,
    kv_transfer_server::{KvTransfer, KvTransferServer as PlainServer},
    push_request::Message,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status, Streaming};

use super::*;
use crate::{Piece, checksum};

fn request(message: Message) -> PushRequest {
    PushRequest {
        message: Some(message),
    }
}

/// What any gRPC library would send for the whole transfer: one layer a piece.
fn messages(here: &Here, identity: &Identity) -> Vec<PushRequest> {
    let (plan, seed) = (identity.plan, identity.seed());
    let mut messages = vec![request(Message::Open(identity.to_open()))];
    let mut sums = vec![];
    for block in plan.blocks() {
        let bytes = here.memory.bytes(HERE[block as usize]);
        for first_layer in 0..3 {
            let piece = Piece {
                block,
                first_layer,
                layers: 1,
                tokens: plan.tokens(block),
            };
            let payload = bytes[piece.range(&GEOMETRY)].to_vec();
            let sum = checksum::layer(&payload);
            sums.push(sum);
            messages.push(request(Message::Piece(v1::Piece {
                block,
                first_layer,
                layers: 1,
                tokens: piece.tokens,
                checksum: checksum::piece(seed, &piece, &[sum]),
                payload: payload.into(),
            })));
        }
    }
    let checksum = checksum::seal(seed, sums);
    messages.push(request(Message::Seal(v1::TransferSeal {
        checksum,
        pieces: 9,
    })));
    messages
}

async fn send(there: &There, messages: Vec<PushRequest>) -> Result<Vec<PushResponse>, Status> {
    let mut client = KvTransferClient::connect(format!("http://{}", there.address))
        .await
        .unwrap();
    let answers = client.push(tokio_stream::iter(messages)).await?;
    answers.into_inner().collect().await
}

#[tokio::test]
async fn a_plain_client_is_understood() {
    let (there, here) = (There::start("life-1").await, Here::full());
    let lease = there.reserve();
    let answers = send(&there, messages(&here, &there.identity(lease)))
        .await
        .unwrap();
    assert_eq!(answers[0].have, [0, 0, 0]);
    let last = answers.last().unwrap();
    assert!(last.sealed);
    assert_eq!((last.pieces, last.bytes), (9, plan().bytes()));
    here.assert_arrived(&there);
    there.stop().await;
}

#[tokio::test]
async fn a_changed_piece_is_data_loss_and_the_lease_never_seals() {
    let (there, here) = (There::start("life-1").await, Here::full());
    let lease = there.reserve();
    let mut messages = messages(&here, &there.identity(lease));
    let Some(Message::Piece(piece)) = &mut messages[4].message else {
        panic!("not a piece")
    };
    let mut payload = piece.payload.to_vec();
    payload[17] ^= 4;
    piece.payload = payload.into();
    assert_eq!(
        send(&there, messages).await.unwrap_err().code(),
        Code::DataLoss
    );
    assert_eq!(
        there.receiver.claim(lease, &key()).unwrap().commit().err(),
        Some(Refusal::NotSealed)
    );
    assert_eq!(there.out(), 0);
    there.stop().await;
}

#[tokio::test]
async fn a_missing_piece_is_never_sealed() {
    let (there, here) = (There::start("life-1").await, Here::full());
    let lease = there.reserve();
    let mut messages = messages(&here, &there.identity(lease));
    messages.remove(9);
    assert_eq!(
        send(&there, messages).await.unwrap_err().code(),
        Code::DataLoss
    );
    there.stop().await;
}

/// A plain tonic service that keeps what it is sent.
#[derive(Clone)]
struct Keeps(Arc<Mutex<Vec<PushRequest>>>);

#[tonic::async_trait]
impl KvTransfer for Keeps {
    type PushStream = ReceiverStream<Result<PushResponse, Status>>;

    async fn push(
        &self,
        request: Request<Streaming<PushRequest>>,
    ) -> Result<Response<Self::PushStream>, Status> {
        let (answers, stream) = tokio::sync::mpsc::channel(4);
        answers
            .try_send(Ok(PushResponse {
                have: vec![0; 3],
                ..Default::default()
            }))
            .unwrap();
        let kept = Arc::clone(&self.0);
        let mut requests = request.into_inner();
        // The test's runtime ends it.
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                let sealed = matches!(request.message, Some(Message::Seal(_)));
                kept.lock().push(request);
                if sealed {
                    answers
                        .send(Ok(PushResponse {
                            sealed,
                            ..Default::default()
                        }))
                        .await
                        .unwrap();
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

#[tokio::test]
async fn a_plain_server_understands() {
    let here = Here::full();
    let kept = Keeps(Arc::default());
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let serve = Server::builder()
        .add_service(PlainServer::new(kept.clone()))
        .serve_with_incoming(incoming);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { serve.await.unwrap() });
    let identity = Identity {
        key: key(),
        lease: 5,
        receiver: "plain".into(),
        sender: "sender-life".into(),
        fingerprint: FINGERPRINT.to_vec(),
        plan: plan(),
    };
    here.push_to(&address.to_string(), identity.clone())
        .await
        .unwrap();

    let kept = kept.0.lock();
    assert_eq!(kept[0].message, Some(Message::Open(identity.to_open())));
    let mut bytes = 0;
    for request in &kept[1..kept.len() - 1] {
        let Some(Message::Piece(piece)) = &request.message else {
            panic!("not a piece")
        };
        let v1::Piece {
            block,
            first_layer,
            layers,
            tokens,
            ..
        } = *piece;
        let header = Piece {
            block,
            first_layer,
            layers,
            tokens,
        };
        let sent = &here.memory.bytes(HERE[block as usize])[header.range(&GEOMETRY)];
        assert_eq!(piece.payload, sent);
        let layer_bytes = header.layer_bytes(&GEOMETRY);
        let sums: Vec<u64> = sent.chunks(layer_bytes).map(checksum::layer).collect();
        assert_eq!(
            piece.checksum,
            checksum::piece(identity.seed(), &header, &sums)
        );
        bytes += sent.len() as u64;
    }
    assert_eq!(bytes, plan().bytes());
    assert!(matches!(
        kept.last().unwrap().message,
        Some(Message::Seal(_))
    ));
}
