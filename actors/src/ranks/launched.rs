//! What launchers of several processes tell each of them.

fn number(name: &str) -> Option<usize> {
    std::env::var(name).ok()?.parse().ok()
}

/// Number of processes that an MPI launcher (`mpirun`, `srun --mpi=pmix`) has started together with this one; `None` if it was
/// started alone.
pub fn launched_ranks() -> Option<usize> {
    let of_slurm = std::env::var_os("PMIX_RANK").and_then(|_| number("SLURM_NTASKS"));
    let size = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter().find_map(number).or(of_slurm);
    size.filter(|n| *n > 1)
}

/// CPU threads of this process, given those that the configuration asks for: where it asks for all (0), the share of the machine's
/// cores among the processes that were started on it.
pub fn threads_of_rank(configured: usize) -> usize {
    if configured > 0 {
        return configured;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let here = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"].into_iter().find_map(number);
    (cores / here.unwrap_or(1).max(1)).max(1)
}
