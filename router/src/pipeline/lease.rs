//! Blocks reserved at a decode worker, given back whatever happens: also when the request is dropped while the worker
//! is still being asked.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use planted::Bug;
use proto::v1::{ReleaseRequest, ReserveRequest, ReserveResponse};
use telemetry::shutdown::Tasks;
use tokio::time::timeout;
use tonic::{Request, Response, Status};
use tracing::debug;

use crate::fleet::Worker;

/// How long giving back may take; after that the lease ends by itself.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// A lease that nobody has used yet. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Lease {
    worker: Arc<Worker>,
    pub(crate) grant: ReserveResponse,
    tasks: Tasks,
    is_used: bool,
}

impl Lease {
    /// Asks `worker` for a lease.
    ///
    /// # Errors
    /// What the worker answered, or DEADLINE_EXCEEDED after `limit`.
    pub(crate) async fn reserve(
        worker: Arc<Worker>,
        request: Request<ReserveRequest>,
        limit: Duration,
        tasks: &Tasks,
    ) -> Result<Self, Status> {
        let mut client = worker.decode();
        let call = Box::pin(async move { client.reserve(request).await.map(Response::into_inner) });
        let mut asking = Asking {
            worker,
            tasks: tasks.clone(),
            call: Some(call),
        };
        let Some(call) = &mut asking.call else {
            return Err(Status::internal("no call to wait for"));
        };
        let grant = match timeout(limit, call).await {
            Ok(answer) => {
                asking.call = None;
                answer?
            }
            Err(_) => return Err(Status::deadline_exceeded("no answer to a reservation")),
        };
        let worker = Arc::clone(&asking.worker);
        Ok(Self {
            worker,
            grant,
            tasks: tasks.clone(),
            is_used: false,
        })
    }

    /// The worker committed it to its sequence: there is nothing to give back.
    pub(crate) fn set_used(&mut self) {
        self.is_used = true;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.is_used && !planted::is(Bug::LeaseKept) {
            let release = release(Arc::clone(&self.worker), self.grant.clone());
            spawn(&self.tasks, release);
        }
    }
}

/// A reservation on its way. Dropping it waits for the answer in the background, to give back what comes.
struct Asking {
    worker: Arc<Worker>,
    tasks: Tasks,
    call: Option<BoxFuture<'static, Result<ReserveResponse, Status>>>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        let Some(call) = self.call.take() else { return };
        let worker = Arc::clone(&self.worker);
        spawn(&self.tasks, async move {
            if let Ok(Ok(grant)) = timeout(RELEASE_TIMEOUT, call).await {
                release(worker, grant).await;
            }
        });
    }
}

async fn release(worker: Arc<Worker>, grant: ReserveResponse) {
    let request = ReleaseRequest {
        lease: grant.lease,
        incarnation: grant.incarnation,
    };
    let mut client = worker.decode();
    let released = timeout(RELEASE_TIMEOUT, client.release(request)).await;
    if !matches!(released, Ok(Ok(_))) {
        // A worker that is gone took the lease along; one that is not lets it expire.
        debug!(
            worker = worker.incarnation(),
            "a lease could not be given back"
        );
    }
}

fn spawn(tasks: &Tasks, work: impl Future<Output = ()> + Send + 'static) {
    // Without a runtime the process is at its end, and so are its connections.
    if tokio::runtime::Handle::try_current().is_ok() {
        tasks.spawn("release", work);
    }
}
