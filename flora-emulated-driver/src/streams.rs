//! Streams, captures and graphs.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};

use crate::calls::{current, driver, give, handle, status};
use crate::state::Stream;
use crate::status::*;

/// # Safety
/// As of the driver's: a place for the answer. So it is below.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, flags: c_uint) -> Status {
    let create = |context| {
        let mut driver = driver();
        let own = driver.handle();
        driver.streams.insert(own, Stream { context, non_blocking: flags == 1, ..Stream::default() });
        // SAFETY: the caller's.
        unsafe { give(stream, handle(own)) }
    };
    status(current().and_then(create))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> Status {
    let mut driver = driver();
    let drained = driver.drain(stream.addr());
    driver.streams.remove(&stream.addr());
    drained
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: *mut c_void) -> Status {
    let mut driver = driver();
    if driver.breaks_captures() {
        return CAPTURE_UNSUPPORTED;
    }
    match stream.addr() {
        0 => current().map_or_else(|failed| failed, |context| driver.drain_blocking(context)),
        stream => driver.drain(stream),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamGetCtx(stream: *mut c_void, context: *mut *mut c_void) -> Status {
    let of = match stream.addr() {
        0 => current(),
        stream => driver().streams.get(&stream).map(|own| own.context).ok_or(INVALID_HANDLE),
    };
    // SAFETY: the caller's.
    status(of.and_then(|own| unsafe { give(context, handle(own)) }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamIsCapturing(stream: *mut c_void, capturing: *mut c_int) -> Status {
    let driver = driver();
    let own = driver.streams.get(&stream.addr());
    if own.is_none() && stream.addr() != 0 {
        return INVALID_HANDLE;
    }
    // SAFETY: the caller's.
    status(unsafe { give(capturing, c_int::from(own.is_some_and(|own| own.capture.is_some()))) })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: *mut c_void, _mode: c_int) -> Status {
    let mut driver = driver();
    match driver.streams.get_mut(&stream.addr()) {
        Some(own) if own.capture.is_none() => {
            (own.capture, own.invalidated) = (Some(Vec::new()), false);
            SUCCESS
        }
        Some(_) => INVALID_VALUE,
        None => CAPTURE_UNSUPPORTED,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(stream: *mut c_void, graph: *mut *mut c_void) -> Status {
    let mut driver = driver();
    let Some(own) = driver.streams.get_mut(&stream.addr()) else { return INVALID_HANDLE };
    let context = own.context;
    let Some(captured) = own.capture.take() else { return INVALID_VALUE };
    if own.invalidated {
        return CAPTURE_INVALIDATED;
    }
    let own = driver.handle();
    driver.graphs.insert(own, (context, captured));
    // SAFETY: the caller's.
    status(unsafe { give(graph, handle(own)) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(
    made: *mut *mut c_void,
    graph: *mut c_void,
    _flags: c_ulonglong,
) -> Status {
    let mut driver = driver();
    let Some(operations) = driver.graphs.get(&graph.addr()).cloned() else { return INVALID_HANDLE };
    let own = driver.handle();
    driver.graphs.insert(own, operations);
    // SAFETY: the caller's.
    status(unsafe { give(made, handle(own)) })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(graph: *mut c_void, stream: *mut c_void) -> Status {
    let mut driver = driver();
    let Some((context, operations)) = driver.graphs.get(&graph.addr()).cloned() else { return INVALID_HANDLE };
    let pushed = operations.into_iter().map(|operation| driver.push(context, stream.addr(), operation));
    pushed.filter(|status| *status != SUCCESS).last().unwrap_or(SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: *mut c_void) -> Status {
    if driver().graphs.remove(&graph.addr()).is_some() { SUCCESS } else { INVALID_HANDLE }
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(graph: *mut c_void) -> Status {
    cuGraphDestroy(graph)
}
