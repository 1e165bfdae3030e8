//! Streams and graphs of a program that isn't flora, for tests.

use cudarc::driver::result::{ctx, graph, stream};
use cudarc::driver::sys;
use flora_driver::{Card, Stream};

/// A stream that waits for no other.
pub(crate) struct OwnStream(sys::CUstream);

/// A captured graph that can be replayed.
pub(crate) struct Graph(sys::CUgraph, sys::CUgraphExec);

/// Makes a card's primary context current, as CUDA's runtime does.
pub(crate) fn use_card(card: &Card) {
    // SAFETY: the card keeps it.
    unsafe {
        let device = cudarc::driver::result::device::get(card.ordinal() as i32).expect("a device");
        let context = cudarc::driver::result::primary_ctx::retain(device).expect("a context");
        ctx::set_current(context).expect("it is made current");
    }
}

impl OwnStream {
    /// Of the context that is current.
    pub(crate) fn new() -> Self {
        Self(stream::create(stream::StreamKind::NonBlocking).expect("a stream"))
    }

    pub(crate) fn stream(&self) -> Stream {
        Stream(self.0.expose_provenance())
    }

    pub(crate) fn wait(&self) {
        // SAFETY: the stream is alive, as below.
        unsafe { stream::synchronize(self.0) }.expect("nothing failed");
    }

    pub(crate) fn begin(&self) {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: as above.
        unsafe { stream::begin_capture(self.0, mode) }.expect("a capture begins");
    }

    pub(crate) fn end(&self) -> Graph {
        // SAFETY: as above.
        unsafe {
            let captured = stream::end_capture(self.0).expect("nothing broke the capture");
            let flags = sys::CUgraphInstantiate_flags(0);
            Graph(captured, graph::instantiate(captured, flags).expect("a graph"))
        }
    }

    pub(crate) fn replay(&self, graph: &Graph) {
        // SAFETY: both are alive.
        unsafe { graph::launch(graph.1, self.0) }.expect("it is replayed");
        self.wait();
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: it is destroyed once.
        let _ = unsafe { stream::destroy(self.0) };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: both are destroyed once.
        unsafe {
            let _ = graph::exec_destroy(self.1);
            let _ = graph::destroy(self.0);
        }
    }
}
