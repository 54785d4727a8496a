//! Processes that `mpirun` or `srun` has started, linked by MPI. Built in by the feature `mpi`;
//! without it several processes are refused instead of each doing everything.

use anyhow::Result;

use super::world::World;

/// How many processes this one was started with, where a launcher says so: Open MPI's variable,
/// that of MPICH, Intel MPI and MS-MPI, and Slurm's beside a rank of PMI or PMIx.
fn launched(of: impl Fn(&str) -> Option<String>) -> Option<usize> {
    let number = |name: &str| of(name)?.parse::<usize>().ok();
    let slurm = || {
        let ranked = of("PMIX_RANK").or_else(|| of("PMI_RANK"));
        ranked.and_then(|_| number("SLURM_STEP_NUM_TASKS"))
    };
    number("OMPI_COMM_WORLD_SIZE").or_else(|| number("PMI_SIZE")).or_else(slurm)
}

/// The processes that a launcher has started with this one; it alone where there was none.
///
/// # Errors
/// When MPI does not start, or several processes were started and MPI is not built in.
pub fn world() -> Result<World> {
    match launched(|name| std::env::var(name).ok()) {
        None => Ok(World::default()),
        Some(processes) => linked(processes),
    }
}

#[cfg(not(feature = "mpi"))]
fn linked(processes: usize) -> Result<World> {
    anyhow::ensure!(
        processes == 1,
        "started as one of {processes} processes, but this program was built without MPI: build it \
         with `cargo build --release --features mpi` (docs/CLUSTER.md), or start one process"
    );
    Ok(World::default())
}

#[cfg(feature = "mpi")]
fn linked(_processes: usize) -> Result<World> {
    use anyhow::Context;
    use mpi::Threading;
    use mpi::environment::{Universe, initialize_with_threading, processor_name};
    use mpi::topology::SimpleCommunicator;
    use mpi::traits::{Communicator, Destination, Root, Source};

    use super::world::Link;

    /// Bytes of one message at most: MPI counts in 31 bits.
    const MESSAGE: usize = 256 << 20;

    /// MPI, which ends when this does. One thread calls it: that which has started it.
    struct Mpi {
        _universe: Universe,
    }

    impl Link for Mpi {
        fn rank(&self) -> usize {
            SimpleCommunicator::world().rank() as usize
        }

        fn size(&self) -> usize {
            SimpleCommunicator::world().size() as usize
        }

        fn gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
            let world = SimpleCommunicator::world();
            if world.rank() != 0 {
                let first = world.process_at_rank(0);
                first.send(&(own.len() as u64));
                own.chunks(MESSAGE).for_each(|part| first.send(part));
                return Ok(Vec::new());
            }
            let mut all = vec![own];
            for rank in 1..world.size() {
                let other = world.process_at_rank(rank);
                let (length, _) = other.receive::<u64>();
                let mut bytes = vec![0; length as usize];
                for part in bytes.chunks_mut(MESSAGE) {
                    other.receive_into(part);
                }
                all.push(bytes);
            }
            Ok(all)
        }

        fn cast(&self, mut of_first: Vec<u8>) -> Result<Vec<u8>> {
            let world = SimpleCommunicator::world();
            let first = world.process_at_rank(0);
            let mut length = of_first.len() as u64;
            first.broadcast_into(&mut length);
            of_first.resize(length as usize, 0);
            of_first.chunks_mut(MESSAGE).for_each(|part| first.broadcast_into(part));
            Ok(of_first)
        }
    }

    let (universe, _) =
        initialize_with_threading(Threading::Funneled).context("MPI was started twice")?;
    World::linked(Mpi { _universe: universe }, processor_name().context("the machine's name")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launcher_is_known_by_its_variables() {
        let of = |given: &'static [(&str, &str)]| {
            launched(move |name| {
                given.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
            })
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("OMPI_COMM_WORLD_SIZE", "4")]), Some(4));
        assert_eq!(of(&[("PMI_SIZE", "2"), ("PMI_RANK", "0")]), Some(2));
        // A script of Slurm's that starts the program itself is no step of several tasks.
        assert_eq!(of(&[("SLURM_STEP_NUM_TASKS", "8")]), None);
        assert_eq!(of(&[("SLURM_STEP_NUM_TASKS", "8"), ("PMIX_RANK", "3")]), Some(8));
    }
}
