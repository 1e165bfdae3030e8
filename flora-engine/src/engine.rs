//! A [`Core`] on a thread of its own: requests by a handle, events by a stream for each of them.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use crate::core::{Core, RequestId};
use crate::decoder::{AdapterSource, Decoder};
use crate::limits::{Accepted, RequestLimits};
use crate::loader::Loader;
use crate::metrics::{AdapterRequests, Metrics};
use crate::options::{Options, OptionsError};
use crate::request::{Event, Request, RequestError};
use crate::residency::Loaded;
use crate::text::Vocabulary;

/// A running engine. Dropping it stops it at once, after the step that it is at: [`EngineHandle::shutdown`] is the kind way.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    thread: Option<thread::JoinHandle<()>>,
}

/// Talks to an engine; cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    stopped: watch::Receiver<bool>,
}

/// What a client hears of its request, as it comes: likelihoods and texts, then one [`Event::Finished`] or [`Event::Failed`], then nothing.
/// Dropping it cancels the request.
#[derive(Debug)]
pub struct Stream {
    events: mpsc::UnboundedReceiver<Event>,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    ended: bool,
}

/// What the thread and its clients see.
struct Shared {
    limits: RequestLimits,
    most_waiting: usize,
    /// Requests that were sent to the thread, but not seen by it.
    sent: AtomicUsize,
    metrics: Mutex<Metrics>,
    adapter_requests: Mutex<AdapterRequests>,
    /// Why new requests are refused.
    closed: OnceLock<RequestError>,
    names: Box<dyn Fn() -> Vec<String> + Send + Sync>,
}

enum Command {
    Submit(Box<Accepted>, mpsc::UnboundedSender<Event>),
    /// Some stream was dropped.
    Dropped,
    /// There is something from the loader.
    Loaded,
    Pin(String),
    Unpin(String),
    /// Running requests may go on until then.
    Shutdown(Instant),
}

impl Engine {
    /// Starts an engine.
    ///
    /// # Errors
    /// Options that can't be run with, or a thread that can't be started.
    pub fn start<D, S>(decoder: D, source: S, vocabulary: Vocabulary, options: Options) -> Result<Self, OptionsError>
    where
        D: Decoder + Send + 'static,
        S: AdapterSource<Prepared = D::Prepared>,
    {
        let thread_error = |error: std::io::Error| OptionsError::Thread(error.to_string());
        let (loaders, most_waiting) = (options.adapters.loaders, options.waiting);
        let core = Core::new(decoder, Arc::new(vocabulary), options)?;
        let source = Arc::new(source);
        let (commands, received) = channel();
        let (results, loaded) = channel();
        let wake = commands.clone();
        let loader = Loader::start(source.clone(), loaders, move |result| {
            let _ = results.send(result);
            let _ = wake.send(Command::Loaded);
        })
        .map_err(thread_error)?;
        let shared = Arc::new(Shared {
            limits: core.limits().clone(),
            most_waiting,
            sent: AtomicUsize::new(0),
            metrics: Mutex::new(core.metrics()),
            adapter_requests: Mutex::new(core.adapter_requests()),
            closed: OnceLock::new(),
            names: Box::new(move || source.names()),
        });
        let worker = Worker {
            core,
            loader,
            loaded,
            commands: received,
            streams: HashMap::new(),
            shared: shared.clone(),
            last_step: Duration::ZERO,
            deadline: None,
        };
        let (stop, stopped) = watch::channel(false);
        let thread = thread::Builder::new()
            .name("flora-engine".into())
            .spawn(move || {
                worker.work();
                stop.send_replace(true);
            })
            .map_err(thread_error)?;
        Ok(Self { handle: EngineHandle { shared, commands, stopped }, thread: Some(thread) })
    }

    /// A handle to it.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Waits for it to stop, as it does after [`EngineHandle::shutdown`]. [`EngineHandle::stopped`] is for those that can't block.
    pub fn join(mut self) {
        self.join_thread();
    }

    fn join_thread(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It catches its panics.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.handle.shutdown(Duration::ZERO);
            self.join_thread();
        }
    }
}

impl EngineHandle {
    /// Takes a request.
    ///
    /// # Errors
    /// It can't be run, too many wait, or the engine stops. An adapter that can't be had is heard of by the stream.
    pub fn submit(&self, request: Request) -> Result<Stream, RequestError> {
        let accepted = self.shared.limits.check(request)?;
        if let Some(error) = self.shared.closed.get() {
            return Err(error.clone());
        }
        let sent = self.shared.sent.fetch_add(1, Ordering::SeqCst);
        let waiting = sent + self.published().waiting;
        if waiting >= self.shared.most_waiting {
            self.shared.sent.fetch_sub(1, Ordering::SeqCst);
            return Err(RequestError::QueueFull { waiting });
        }
        let (sender, events) = mpsc::unbounded_channel();
        if self.commands.send(Command::Submit(Box::new(accepted), sender)).is_err() {
            self.shared.sent.fetch_sub(1, Ordering::SeqCst);
            return Err(self.shared.reason());
        }
        Ok(Stream { events, shared: self.shared.clone(), commands: self.commands.clone(), ended: false })
    }

    /// What requests have to keep to.
    pub fn limits(&self) -> &RequestLimits {
        &self.shared.limits
    }

    /// How it stood after the last step, with the requests that came since.
    pub fn metrics(&self) -> Metrics {
        // One that is taken meanwhile may be counted twice, and is never missed.
        let sent = self.shared.sent.load(Ordering::SeqCst);
        let published = self.published();
        Metrics { waiting: published.waiting + sent, ..published }
    }

    fn published(&self) -> Metrics {
        *self.shared.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which adapters requests had after the last step.
    pub fn adapter_requests(&self) -> AdapterRequests {
        self.shared.adapter_requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a request that came now would find a place: [`Self::is_healthy`], and fewer wait than may.
    pub fn is_ready(&self) -> bool {
        let waiting = self.shared.sent.load(Ordering::SeqCst) + self.published().waiting;
        self.is_healthy() && waiting < self.shared.most_waiting
    }

    /// The names of the adapters that there are now. Asks the source, on this thread.
    pub fn adapters(&self) -> Vec<String> {
        (self.shared.names)()
    }

    /// Keeps an adapter from being evicted once it is resident.
    pub fn pin(&self, adapter: &str) {
        self.tell(Command::Pin(adapter.into()));
    }

    /// The opposite of [`Self::pin`].
    pub fn unpin(&self, adapter: &str) {
        self.tell(Command::Unpin(adapter.into()));
    }

    /// Whether requests are taken: no shutdown has begun, and the decoder hasn't panicked.
    pub fn is_healthy(&self) -> bool {
        self.shared.closed.get().is_none()
    }

    /// Refuses new requests from now on, fails those that haven't begun, lets the others end until `grace` is over, fails what is
    /// left then, and stops. Returns at once; said again, the shorter time counts.
    pub fn shutdown(&self, grace: Duration) {
        self.shared.closed.get_or_init(|| RequestError::ShuttingDown);
        let now = Instant::now();
        // Longer than anything runs, where the clock can't tell.
        self.tell(Command::Shutdown(now.checked_add(grace).unwrap_or_else(|| now + Duration::from_secs(86_400 * 365))));
    }

    /// Waits until it has stopped.
    pub async fn stopped(&self) {
        // A sender that is gone is a thread that is.
        let _ = self.stopped.clone().wait_for(|stopped| *stopped).await;
    }

    fn tell(&self, command: Command) {
        // One that has stopped needs no telling.
        let _ = self.commands.send(command);
    }
}

impl fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl Shared {
    fn reason(&self) -> RequestError {
        self.closed.get().cloned().unwrap_or(RequestError::ShuttingDown)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("closed", &self.closed).finish_non_exhaustive()
    }
}

impl Stream {
    /// The next event, or `None` after the last.
    pub async fn recv(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        self.pass_on(event)
    }

    /// [`Self::recv`] for threads that may block.
    pub fn blocking_recv(&mut self) -> Option<Event> {
        let event = self.events.blocking_recv();
        self.pass_on(event)
    }

    /// An engine that is gone without a word is one that failed.
    fn pass_on(&mut self, event: Option<Event>) -> Option<Event> {
        let event = match event {
            Some(event) => event,
            None if self.ended => return None,
            None => Event::Failed(self.shared.reason()),
        };
        self.ended |= event.is_last();
        Some(event)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.ended {
            self.events.close();
            let _ = self.commands.send(Command::Dropped);
        }
    }
}

/// What the thread has.
struct Worker<D: Decoder> {
    core: Core<D>,
    loader: Loader,
    loaded: Receiver<Loaded<D::Prepared>>,
    commands: Receiver<Command>,
    streams: HashMap<RequestId, mpsc::UnboundedSender<Event>>,
    shared: Arc<Shared>,
    last_step: Duration,
    deadline: Option<Instant>,
}

impl<D: Decoder> Worker<D> {
    /// Works until it is told to stop, or the decoder panics; all requests have heard of it then.
    fn work(mut self) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.steps())) {
            let error = RequestError::Model(format!("it panicked: {}", panic_text(&*panic)));
            let _ = self.shared.closed.set(error.clone());
            self.end(&error);
        } else {
            self.end(&RequestError::ShuttingDown);
        }
        // A decoder that panicked may do it again.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(self)));
    }

    /// Fails all requests, those among them that were sent and not seen yet.
    fn end(&mut self, error: &RequestError) {
        let mut streams: Vec<_> = self.streams.drain().map(|(_, stream)| stream).collect();
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(_, stream) = command {
                streams.push(stream);
                self.shared.sent.fetch_sub(1, Ordering::SeqCst);
            }
        }
        {
            let mut metrics = self.shared.metrics.lock().unwrap_or_else(PoisonError::into_inner);
            metrics.failed += streams.len() as u64;
            (metrics.waiting, metrics.running, metrics.cache_blocks_used) = (0, 0, 0);
        }
        {
            let mut requests = self.shared.adapter_requests.lock().unwrap_or_else(PoisonError::into_inner);
            (requests.running, requests.waiting) = (Vec::new(), Vec::new());
        }
        for stream in streams {
            let _ = stream.send(Event::Failed(error.clone()));
        }
    }

    fn steps(&mut self) {
        loop {
            self.listen();
            if self.deadline.is_some_and(|deadline| self.core.is_empty() || Instant::now() >= deadline) {
                return;
            }
            // What requests that just came wait for is looked up beside the step.
            self.order();
            let start = Instant::now();
            let events = self.core.step(start);
            self.last_step = start.elapsed();
            self.order();
            self.deliver(events);
        }
    }

    /// Passes orders on to the loader.
    fn order(&mut self) {
        for order in self.core.take_orders() {
            self.loader.order(order);
        }
    }

    /// Takes the commands that are there; waits for one where there is nothing else to do.
    fn listen(&mut self) {
        if self.core.is_stalled() {
            let command = match self.deadline {
                None => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => self.commands.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            };
            match command {
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.deadline = Some(Instant::now()),
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.deadline = Some(Instant::now());
                    return;
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(request, stream) => self.submit(*request, stream),
            Command::Dropped => {
                let gone = self.streams.extract_if(|_, stream| stream.is_closed());
                for (request, _) in gone {
                    self.core.cancel(request);
                }
            }
            Command::Loaded => {
                while let Ok(loaded) = self.loaded.try_recv() {
                    self.core.loaded(loaded);
                }
            }
            Command::Pin(adapter) => self.core.pin(&adapter),
            Command::Unpin(adapter) => self.core.unpin(&adapter),
            Command::Shutdown(deadline) => {
                self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
                let events = self.core.fail_unbegun(&RequestError::ShuttingDown);
                self.deliver(events);
            }
        }
        self.publish();
    }

    fn submit(&mut self, request: Accepted, stream: mpsc::UnboundedSender<Event>) {
        let accepted = match self.deadline {
            Some(_) => Err(RequestError::ShuttingDown),
            None => self.core.enqueue(request, Instant::now()),
        };
        match accepted {
            Ok(request) => {
                self.streams.insert(request, stream);
            }
            Err(error) => {
                let _ = stream.send(Event::Failed(error));
            }
        }
        // Counted among the waiting before it is no longer among the sent, so that it is never missed.
        self.publish();
        self.shared.sent.fetch_sub(1, Ordering::SeqCst);
    }

    /// Passes events on. Those of streams that were dropped are cancelled by the command that comes of it.
    ///
    /// Numbers are published first: who hears of an end finds it counted.
    fn deliver(&mut self, events: Vec<(RequestId, Event)>) {
        self.publish();
        for (request, event) in events {
            let last = event.is_last();
            if let Some(stream) = self.streams.get(&request) {
                let _ = stream.send(event);
            }
            if last {
                self.streams.remove(&request);
            }
        }
    }

    fn publish(&self) {
        let metrics = Metrics { last_step: self.last_step, ..self.core.metrics() };
        *self.shared.metrics.lock().unwrap_or_else(PoisonError::into_inner) = metrics;
        let requests = self.core.adapter_requests();
        *self.shared.adapter_requests.lock().unwrap_or_else(PoisonError::into_inner) = requests;
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a word")
}
