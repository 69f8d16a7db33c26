//! The CPU as a machine of passes.

use std::sync::Arc;

use rehearsal_kernels::attention::Family;
use rehearsal_kernels::gemm::Precision;

/// The CPU, with the precision of the factors of its products.
#[derive(Clone)]
pub struct Cpu(pub Precision);

/// Positions of the rows of a pass, and the families that they belong to.
pub struct Layout {
    pub positions: Vec<u32>,
    pub families: Arc<Vec<Family>>,
}
