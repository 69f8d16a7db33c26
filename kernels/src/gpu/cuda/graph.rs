//! Launches that were captured and are replayed.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{ThreadId, current};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, result, sys};
use candle_core::{Result, bail};

use crate::gpu::backend::LaunchGraph;

/// The stream on which launches are captured, while the device's own stream is used by other threads.
pub struct Captures {
    stream: Arc<CudaStream>,
    /// Held while one thread captures.
    turn: Mutex<()>,
    /// The thread that captures.
    thread: Mutex<Option<ThreadId>>,
}

impl Captures {
    pub fn new(main: &Arc<CudaStream>) -> Result<Self> {
        Ok(Self { stream: main.context().new_stream().w()?, turn: Mutex::default(), thread: Mutex::default() })
    }

    /// The stream on which launches are captured.
    pub fn own_stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The stream on which this thread captures launches, if it does.
    pub fn stream(&self) -> Option<&Arc<CudaStream>> {
        let thread = *self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        (thread == Some(current().id())).then_some(&self.stream)
    }

    /// Captures what `f` launches; `main` is where it will be replayed.
    pub fn capture(&self, main: &Arc<CudaStream>, f: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn LaunchGraph>> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        main.context().bind_to_thread().w()?;
        // SAFETY: the stream is alive, and nothing else uses it.
        unsafe { result::stream::begin_capture(self.stream.cu_stream(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) }.w()?;
        let open = Open::new(self);
        let captured = f();
        let graph = open.end();
        captured?;
        let graph = graph?;
        // SAFETY: the graph is valid and is destroyed once; what is instantiated does not need it.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)).w();
            let _ = result::graph::destroy(graph);
            executable?
        };
        Ok(Box::new(Graph { executable, stream: main.clone() }))
    }
}

/// A capture that has begun. It ends when this is dropped, whatever happens.
struct Open<'a> {
    captures: &'a Captures,
    ended: bool,
}

impl<'a> Open<'a> {
    fn new(captures: &'a Captures) -> Self {
        *captures.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(current().id());
        Self { captures, ended: false }
    }

    fn end(mut self) -> Result<sys::CUgraph> {
        self.close()
    }

    fn close(&mut self) -> Result<sys::CUgraph> {
        self.ended = true;
        *self.captures.thread.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // SAFETY: the capture began on this stream and was not ended.
        let graph = unsafe { result::stream::end_capture(self.captures.stream.cu_stream()) }.w()?;
        if graph.is_null() {
            bail!("no GPU operation was captured");
        }
        Ok(graph)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Ok(graph) = self.close() {
            // SAFETY: the graph is valid and is destroyed once.
            let _ = unsafe { result::graph::destroy(graph) };
        }
    }
}

struct Graph {
    executable: sys::CUgraphExec,
    stream: Arc<CudaStream>,
}

// SAFETY: a graph is launched by its owner only, one launch at a time.
unsafe impl Send for Graph {}

impl LaunchGraph for Graph {
    fn replay(&self) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: both are alive.
        unsafe { result::graph::launch(self.executable, self.stream.cu_stream()) }.w()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.stream.context().bind_to_thread().is_ok() {
            // SAFETY: instantiated once, destroyed once; launches under way are completed.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}
