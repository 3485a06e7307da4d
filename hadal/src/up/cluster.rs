//! All processes of a run together: what state each is in, and the router told of it.

use std::{convert::Infallible, time::Duration};

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use telemetry::definitions::ROUTER_WORKERS;
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    folder::Folder,
    plan::{DRAIN_SECONDS, Plan},
    screen::Screen,
    spec::Role,
    supervisor::{Change, Event, Supervisor},
    workers_file,
};
use crate::{client::Client, format, series};

/// How long the router may take to find workers that are ready.
const DISCOVERY: Duration = Duration::from_secs(30);
/// A stop that takes longer is explained.
const QUICK: Duration = Duration::from_secs(1);
/// Pause between looks at the router while it finds them.
const DISCOVERY_POLL: Duration = Duration::from_millis(10);

/// The processes of a run.
pub(super) struct Cluster {
    screen: Screen,
    members: Vec<Member>,
    events: mpsc::Receiver<Event>,
    supervisors: JoinSet<()>,
    stop: CancellationToken,
    folder: Folder,
}

struct Member {
    name: String,
    role: Role,
    bar: ProgressBar,
    pid: u32,
    /// `None` until it is ready.
    addresses: Option<std::collections::BTreeMap<String, String>>,
}

impl Member {
    fn address(&self, name: &str) -> Option<&str> {
        self.addresses.as_ref()?.get(name).map(String::as_str)
    }
}

impl Cluster {
    /// Starts every process of the plan at once.
    pub(super) fn start(
        plan: &Plan,
        folder: Folder,
        screen: Screen,
        abort: &CancellationToken,
    ) -> anyhow::Result<Self> {
        workers_file::write(folder.path(), std::iter::empty())
            .context("writing the list of workers")?;
        let (sender, events) = mpsc::channel(64);
        let stop = CancellationToken::new();
        let mut supervisors = JoinSet::new();
        let mut members = Vec::new();
        for (slot, spec) in plan.specs.iter().cloned().enumerate() {
            members.push(Member {
                bar: screen.bar(&spec.name),
                name: spec.name.clone(),
                role: spec.role,
                pid: 0,
                addresses: None,
            });
            let supervisor = Supervisor {
                slot,
                spec,
                program: plan.program.clone(),
                folder: folder.path().to_owned(),
                events: sender.clone(),
                stop: stop.clone(),
                abort: abort.clone(),
            };
            supervisors.spawn(supervisor.run());
        }
        Ok(Self {
            screen,
            members,
            events,
            supervisors,
            stop,
            folder,
        })
    }

    /// Waits until every process is ready and the router has found the workers.
    pub(super) async fn ready(&mut self) -> anyhow::Result<()> {
        while self.members.iter().any(|member| member.addresses.is_none()) {
            self.next_event().await?;
        }
        let client = self.client(None)?;
        let workers = self.workers().count() as u64;
        let deadline = Instant::now() + DISCOVERY;
        while known_workers(&client).await? < workers {
            ensure!(
                Instant::now() < deadline,
                "the router does not find its workers"
            );
            tokio::time::sleep(DISCOVERY_POLL).await;
        }
        Ok(())
    }

    /// Follows the processes for as long as they run.
    pub(super) async fn follow(&mut self) -> anyhow::Result<Infallible> {
        loop {
            self.next_event().await?;
        }
    }

    /// Asks every process to stop, waits for them, removes what was temporary.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        for member in &self.members {
            member.bar.finish_and_clear();
        }
        self.screen.line("Stopping.");
        self.stop.cancel();
        // Nobody reads events any more; supervisors must not wait for room.
        self.events.close();
        let (supervisors, screen) = (&mut self.supervisors, &self.screen);
        let ended = async {
            while let Some(ended) = supervisors.join_next().await {
                ended.context("following a process")?;
            }
            anyhow::Ok(())
        };
        let mut ended = std::pin::pin!(ended);
        if let Ok(ended) = tokio::time::timeout(QUICK, &mut ended).await {
            ended?;
        } else {
            screen.line(&format!(
                "Requests that still run have {DRAIN_SECONDS} s to end; Ctrl-C again stops at once."
            ));
            ended.await?;
        }
        self.folder.close()
    }

    /// A client of the router.
    pub(super) fn client(&self, api_key: Option<String>) -> anyhow::Result<Client> {
        let router = self
            .members
            .iter()
            .find(|member| member.role == Role::Router);
        let http = router.and_then(|router| router.address("http"));
        let http = http.context("the router did not say where it listens")?;
        Ok(Client::new(&format!("http://{http}"), api_key)?)
    }

    /// Name and metrics address of every worker.
    pub(super) fn worker_metrics(&self) -> Vec<(String, String)> {
        self.workers()
            .filter_map(|member| Some((member.name.clone(), member.address("metrics")?.to_owned())))
            .collect()
    }

    /// Where people look.
    pub(super) fn screen(&self) -> &Screen {
        &self.screen
    }

    fn workers(&self) -> impl Iterator<Item = &Member> {
        self.members
            .iter()
            .filter(|member| member.role != Role::Router)
    }

    async fn next_event(&mut self) -> anyhow::Result<()> {
        let event = self.events.recv().await.context("every process is gone")?;
        let member = &mut self.members[event.slot];
        let was_listed = member.addresses.is_some();
        match event.change {
            Change::Spawned(pid) => member.pid = pid,
            Change::Loading { stage, done, total } => {
                member.bar.set_message(match total {
                    0 => stage,
                    _ => format!("{stage} {} %", done.saturating_mul(100) / total),
                });
            }
            Change::Ready { addresses, after } => {
                member.addresses = Some(addresses);
                member.bar.finish_and_clear();
                let address = member
                    .address("http")
                    .or(member.address("grpc"))
                    .unwrap_or("-");
                let metrics = match member.address("metrics") {
                    Some(address) => format!("metrics at {address}, "),
                    None => String::new(),
                };
                self.screen.line(&format!(
                    "  {:12} ready at {address} after {} ({metrics}pid {})",
                    member.name,
                    format::duration(after),
                    member.pid,
                ));
            }
            Change::Died {
                why,
                log_tail,
                again_in,
            } => {
                member.addresses = None;
                member.bar.finish_and_clear();
                let name = &member.name;
                let Some(pause) = again_in else {
                    self.folder.keep();
                    let log = self.folder.path().join(format!("{name}.log"));
                    bail!(
                        "{name} could not start: {why}\n{log_tail}(its log: {})",
                        log.display()
                    );
                };
                self.screen.problem(&format!(
                    "  {name:12} {why}; starting it again in {}",
                    format::duration(pause)
                ));
            }
        }
        let member = &self.members[event.slot];
        if member.role != Role::Router && member.addresses.is_some() != was_listed {
            self.write_workers()?;
        }
        Ok(())
    }

    fn write_workers(&self) -> anyhow::Result<()> {
        let workers = self
            .workers()
            .filter_map(|member| Some((member.role, member.address("grpc")?)));
        workers_file::write(self.folder.path(), workers).context("writing the list of workers")
    }
}

/// Workers that the router would send requests to.
async fn known_workers(router: &Client) -> anyhow::Result<u64> {
    let text = router.text("/metrics").await?;
    Ok(series::sum(&text, ROUTER_WORKERS.name, "state=\"ready\""))
}
