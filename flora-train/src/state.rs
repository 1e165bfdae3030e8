//! A job's state on disk: one safetensors file, with what isn't a tensor as JSON in its header. One file is replaced by one renaming,
//! so that a killed process or a full disk leaves the former state, and a resumed job goes on bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flora_checkpoint::{FileError, Operand, TensorFile};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adamw::Moments;
use crate::job::{Job, Progress, set};

/// Of the layout of the file.
const VERSION: u32 = 2;
/// The note that holds the state.
const NOTE: &str = "flora_job";

/// Why a job can't be resumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The file can't be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another file, or one of another version.
    #[error("{} isn't the state of a job that this version of flora can resume: {problem}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        problem: String,
    },
    /// The job that was saved is another.
    #[error(
        "{} is the state of a job whose {what} was {saved} and is {asked}; give it as it was, or remove the file to begin anew",
        path.display()
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// The option, or the data.
        what: String,
        /// Its saved value.
        saved: String,
        /// That of the job.
        asked: String,
    },
}

#[derive(Serialize, Deserialize)]
struct State {
    version: u32,
    /// What the job was told.
    options: Value,
    /// Which model it is an adapter of.
    model: Option<String>,
    /// Digests of what it learns from and what it is evaluated on.
    data: String,
    held_out: Option<String>,
    progress: Progress,
}

impl Job {
    /// Saves the state at `path`.
    pub(crate) fn save_state(&self, path: &Path) -> Result<(), StateError> {
        let foreign =
            |error: serde_json::Error| StateError::Foreign { path: path.to_owned(), problem: error.to_string() };
        let state = State { progress: self.progress.clone(), ..self.identity().map_err(foreign)? };
        let mut tensors = BTreeMap::new();
        for (index, parameter) in self.adapter.parameters().enumerate() {
            let shape = &parameter.values.shape;
            let mut add = |what: &str, values: &[f32]| {
                let name = format!("{what}/{}/{}", parameter.path, parameter.operand);
                tensors.insert(name, Operand { shape: shape.clone(), values: values.to_vec() });
            };
            add("value", &parameter.values.values);
            if let Some(moments) = self.moments.get(index) {
                add("first", &moments.first);
                add("second", &moments.second);
            }
            if let Some(best) = self.best.as_ref().and_then(|best| best.get(index)) {
                add("best", best);
            }
        }
        let notes = [(NOTE.to_owned(), serde_json::to_string(&state).map_err(foreign)?)].into();
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(|source| FileError::Io {
                path: parent.to_owned(),
                action: "create",
                source,
            })?;
        }
        Ok(TensorFile { tensors, notes }.write(path)?)
    }

    /// Goes on from the state at `path`.
    pub(crate) fn resume(&mut self, path: &Path) -> Result<(), StateError> {
        let foreign = |problem: String| StateError::Foreign { path: path.to_owned(), problem };
        let TensorFile { mut tensors, notes } = TensorFile::read(path)?;
        let note = notes.get(NOTE).ok_or_else(|| foreign(format!("it has no `{NOTE}`")))?;
        let saved: State = serde_json::from_str(note).map_err(|error| foreign(error.to_string()))?;
        if saved.version != VERSION {
            return Err(foreign(format!("it has the version {} and not {VERSION}", saved.version)));
        }
        let own = self.identity().map_err(|error| foreign(error.to_string()))?;
        if let Some((what, saved, asked)) = difference(&saved, &own) {
            return Err(StateError::Other { path: path.to_owned(), what, saved, asked });
        }
        let progress = saved.progress;
        if progress.position.taken >= self.data.sequences().len() {
            return Err(foreign("it is beyond the end of its data".to_owned()));
        }
        let mut take = |what: &str| {
            let of = |parameter: crate::adapter::Parameter<'_>| {
                let name = format!("{what}/{}/{}", parameter.path, parameter.operand);
                match tensors.remove(&name) {
                    Some(tensor) if tensor.shape == parameter.values.shape => Ok(tensor.values),
                    Some(tensor) => Err(foreign(format!("`{name}` has the shape {:?}", tensor.shape))),
                    None => Err(foreign(format!("`{name}` is missing"))),
                }
            };
            self.adapter.parameters().map(of).collect::<Result<Vec<_>, _>>()
        };
        let (values, first, second) = (take("value")?, take("first")?, take("second")?);
        let best = progress.best.map(|_| take("best")).transpose()?;
        set(&mut self.adapter, values);
        self.moments = first.into_iter().zip(second).map(|(first, second)| Moments { first, second }).collect();
        (self.best, self.progress) = (best, progress);
        Ok(())
    }

    /// What tells the job from others, without its progress.
    fn identity(&self) -> Result<State, serde_json::Error> {
        Ok(State {
            version: VERSION,
            options: serde_json::to_value(&self.options)?,
            model: self.model.as_deref().map(str::to_owned),
            data: self.data.digest().to_owned(),
            held_out: self.held_out.as_ref().map(|data| data.digest().to_owned()),
            progress: Progress::default(),
        })
    }
}

/// The first thing in which a saved job isn't the one that is asked for.
fn difference(saved: &State, own: &State) -> Option<(String, String, String)> {
    let texts = |what: &str, saved: &Value, own: &Value| (what.to_owned(), shortened(saved), shortened(own));
    let (Value::Object(old), Value::Object(new)) = (&saved.options, &own.options) else {
        return (saved.options != own.options).then(|| texts("options", &saved.options, &own.options));
    };
    let null = Value::Null;
    for option in old.keys().chain(new.keys()) {
        let (old, new) = (old.get(option).unwrap_or(&null), new.get(option).unwrap_or(&null));
        // When it is saved changes nothing of what it learns.
        if old != new && option != "save_every" {
            return Some(texts(&format!("`{option}`"), old, new));
        }
    }
    let held = |state: &State| Value::from(state.held_out.clone());
    let model = |state: &State| Value::from(state.model.clone());
    [
        ("model", model(saved), model(own)),
        ("data", Value::from(saved.data.clone()), Value::from(own.data.clone())),
        ("held-out data", held(saved), held(own)),
    ]
    .iter()
    .find(|(_, old, new)| old != new)
    .map(|(what, old, new)| texts(what, old, new))
}

fn shortened(value: &Value) -> String {
    value.to_string().chars().take(200).collect()
}
