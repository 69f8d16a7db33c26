//! Rotary tables on a device, uploaded once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;

use super::backend::GpuBackend;
use super::buffer::Buffer;
use super::launcher::Launcher;
use crate::rope::Angles;

/// Cosines and sines of all positions, on a device.
pub struct Table {
    /// Cosines, `[positions, head_dim / 2]`, in f32.
    pub cosines: Buffer,
    /// Sines, `[positions, head_dim / 2]`, in f32.
    pub sines: Buffer,
}

/// Device tables by the address of the host's table, which is kept alive so that the address stays its own.
type Tables = BTreeMap<usize, (Arc<Angles>, Arc<Table>)>;

/// A backend, and the rotary tables that a model keeps on its device between passes. Clones share the tables.
#[derive(Clone)]
pub struct Context {
    /// Backend of the device.
    pub backend: Arc<dyn GpuBackend>,
    tables: Arc<Mutex<Tables>>,
}

impl Context {
    /// A context without tables.
    pub fn new(backend: Arc<dyn GpuBackend>) -> Self {
        Self { backend, tables: Arc::default() }
    }

    /// The table of `angles` on the device; the first call uploads it.
    pub fn table(&self, launcher: &Launcher, angles: &Arc<Angles>) -> Result<Arc<Table>> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let key = Arc::as_ptr(angles) as usize;
        if let Some((_, table)) = tables.get(&key) {
            return Ok(table.clone());
        }
        let (cosines, sines) = angles.tables();
        let up = |x: Vec<f32>| launcher.upload_floats(&x);
        let table = Arc::new(Table { cosines: up(cosines)?, sines: up(sines)? });
        tables.insert(key, (angles.clone(), table.clone()));
        Ok(table)
    }
}
