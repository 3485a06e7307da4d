//! The process's own memory, CPU time and open files, under the names that Prometheus clients share. Read from `/proc`
//! when somebody scrapes; elsewhere than on Linux they stay at zero.

use std::fs;

use prometheus::{Gauge, IntGauge, Opts, Registry};

/// Pages and clock ticks of `/proc` on every architecture that Linux supports by default.
const PAGE_BYTES: i64 = 4096;
const TICKS_PER_SECOND: f64 = 100.0;

/// Gauges that [`refresh`](ProcessMetrics::refresh) sets.
#[derive(Clone, Debug)]
pub struct ProcessMetrics {
    resident: IntGauge,
    cpu: Gauge,
    files: IntGauge,
    threads: IntGauge,
}

impl ProcessMetrics {
    pub(crate) fn unregistered() -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| IntGauge::with_opts(Opts::new(name, help));
        Ok(Self {
            resident: gauge("process_resident_memory_bytes", "Resident memory")?,
            cpu: Gauge::with_opts(Opts::new(
                "process_cpu_seconds_total",
                "User and system CPU time",
            ))?,
            files: gauge("process_open_fds", "Open file descriptors")?,
            threads: gauge("process_threads", "Threads of the operating system")?,
        })
    }

    pub(crate) fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.resident.clone()))?;
        registry.register(Box::new(self.cpu.clone()))?;
        registry.register(Box::new(self.files.clone()))?;
        registry.register(Box::new(self.threads.clone()))
    }

    pub(crate) fn refresh(&self) {
        if let Ok(stat) = fs::read_to_string("/proc/self/stat")
            && let Some(usage) = parse_stat(&stat)
        {
            self.resident.set(usage.resident_bytes);
            self.cpu.set(usage.cpu_seconds);
            self.threads.set(usage.threads);
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // One of them is the directory being read.
            self.files.set(entries.count().saturating_sub(1) as i64);
        }
    }
}

#[derive(Debug, PartialEq)]
struct Usage {
    resident_bytes: i64,
    cpu_seconds: f64,
    threads: i64,
}

/// proc_pid_stat(5): the command in parentheses may hold anything, so fields are counted from its last `)`.
fn parse_stat(stat: &str) -> Option<Usage> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<i64>().ok();
    Some(Usage {
        resident_bytes: number(24)? * PAGE_BYTES,
        cpu_seconds: (number(14)? + number(15)?) as f64 / TICKS_PER_SECOND,
        threads: number(20)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_past_a_command_that_holds_parentheses() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 0 0 0 0 150 50 0 0 20 0 9 0 100 4096000 25 1 1";
        let usage = parse_stat(stat).unwrap();
        assert_eq!(
            usage,
            Usage {
                resident_bytes: 25 * PAGE_BYTES,
                cpu_seconds: 2.0,
                threads: 9
            }
        );
    }
}
