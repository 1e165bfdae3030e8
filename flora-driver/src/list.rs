//! What can be said of a list of launches without a card: whether it is whole, where its buffers lie in one piece of memory, and how
//! it differs from another.

use flora_codegen::target::export::{Contents, LaunchList, Operand};

use crate::error::DriverError;

/// What buffers are aligned to, in bytes.
pub(crate) const ALIGNMENT: u64 = 512;

/// Threads of a block that every card takes.
const MOST_THREADS: u64 = 1024;

/// Where a list's buffers lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// One for each buffer.
    pub(crate) places: Vec<Place>,
    /// Of all but operands.
    pub(crate) bytes: u64,
    /// What addresses of operands have to be multiples of.
    pub(crate) alignment: u64,
}

/// Where a buffer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// With the caller.
    Operand(Operand),
    /// At this offset of the memory for tables, state and scratch.
    Own(u64),
    /// There, and what it begins as at the other one.
    State { live: u64, pristine: u64 },
}

impl Layout {
    /// Lays a list out.
    ///
    /// # Errors
    /// The list contradicts itself.
    pub(crate) fn of(list: &LaunchList) -> Result<Self, DriverError> {
        check(list).map_err(|problem| DriverError::List { problem })?;
        let mut bytes = 0u64;
        let mut take = |length: u64| {
            let first = bytes;
            bytes = length.checked_next_multiple_of(ALIGNMENT).and_then(|length| bytes.checked_add(length))?;
            Some(first)
        };
        let place = |buffer: &flora_codegen::target::export::ExportedBuffer| match buffer.contents {
            Contents::Operand(operand) => Some(Place::Operand(operand)),
            Contents::Table(_) | Contents::Scratch => take(buffer.bytes).map(Place::Own),
            Contents::State(_) => {
                let live = take(buffer.bytes)?;
                Some(Place::State { live, pristine: take(buffer.bytes)? })
            }
        };
        let places = list.buffers.iter().map(place).collect::<Option<Vec<_>>>();
        let too_long = || DriverError::List { problem: "its buffers are longer than any memory".to_owned() };
        Ok(Self { places: places.ok_or_else(too_long)?, bytes, alignment: alignment(list) })
    }
}

/// The widest vector that a kernel reads.
fn alignment(list: &LaunchList) -> u64 {
    let of = |source: &str| {
        let structures = source.split("struct __align__(").skip(1);
        structures.filter_map(|rest| rest.split_once(')')?.0.parse::<u64>().ok()).max().unwrap_or(4)
    };
    list.kernels.iter().map(|kernel| of(&kernel.source)).max().unwrap_or(4).clamp(4, 256)
}

/// Nothing, or what is wrong with a list that may come from anywhere.
fn check(list: &LaunchList) -> Result<(), String> {
    for (position, buffer) in list.buffers.iter().enumerate() {
        let filled = match &buffer.contents {
            Contents::Table(words) | Contents::State(words) => 4 * words.len() as u64,
            Contents::Operand(_) | Contents::Scratch => 0,
        };
        if filled > buffer.bytes {
            return Err(format!("buffer {position} has {filled} bytes of contents and is {} long", buffer.bytes));
        }
    }
    let operands: Vec<_> = list.operands().map(|(_, operand, _)| operand).collect();
    if let Some((at, twice)) = operands.iter().enumerate().find(|(at, operand)| operands[..*at].contains(operand)) {
        return Err(format!("the operands {at} and one before it are both {twice:?}"));
    }
    for (position, launch) in list.launches.iter().enumerate() {
        let Some(kernel) = list.kernels.get(launch.kernel) else {
            return Err(format!("launch {position} is of kernel {}, of {}", launch.kernel, list.kernels.len()));
        };
        let threads = kernel.block.iter().map(|extent| u64::from(*extent)).product::<u64>();
        if threads == 0 || threads > MOST_THREADS || launch.grid.contains(&0) {
            return Err(format!("launch {position} has {:?} blocks of {:?} threads", launch.grid, kernel.block));
        }
        if !launch.by_value.len().is_multiple_of(2) {
            return Err(format!("launch {position} passes {} words by value, an odd number", launch.by_value.len()));
        }
        for argument in &launch.arguments {
            let end = argument.offset.checked_add(argument.bytes);
            let length = list.buffers.get(argument.buffer).map(|buffer| buffer.bytes);
            if length.zip(end).is_none_or(|(length, end)| end > length) {
                return Err(format!("launch {position} has an argument beyond its buffer, {argument:?}"));
            }
        }
    }
    Ok(())
}

/// The first difference between two lists that isn't in the words of tables; `None` where a graph of one runs the other.
pub(crate) fn difference(one: &LaunchList, other: &LaunchList) -> Option<String> {
    if one.kernels != other.kernels {
        return Some("other kernels".to_owned());
    }
    if one.buffers.len() != other.buffers.len() {
        return Some(format!("{} buffers in place of {}", other.buffers.len(), one.buffers.len()));
    }
    let buffers = one.buffers.iter().zip(&other.buffers).enumerate();
    for (position, (own, theirs)) in buffers {
        let is_alike = own.bytes == theirs.bytes
            && match (&own.contents, &theirs.contents) {
                (Contents::Table(own), Contents::Table(theirs)) => own.len() == theirs.len(),
                (own, theirs) => own == theirs,
            };
        if !is_alike {
            return Some(format!("buffer {position} has {} bytes in place of {}", theirs.bytes, own.bytes));
        }
    }
    let differs = one.launches.len() != other.launches.len();
    let launches = one.launches.iter().zip(&other.launches);
    let first = launches.enumerate().find(|(_, (own, theirs))| own != theirs).map(|(position, _)| position);
    match first {
        Some(position) => Some(format!("launch {position} has other blocks or lengths")),
        None => differs.then(|| format!("{} launches in place of {}", other.launches.len(), one.launches.len())),
    }
}

#[cfg(test)]
mod tests {
    use flora_codegen::target::export::{Argument, ExportedBuffer, ExportedKernel, ExportedLaunch};

    use super::*;

    fn list() -> LaunchList {
        let source = "struct __align__(16) float_4 {};\nextern __shared__ __align__(128) uint8 m[];".to_owned();
        let kernel = ExportedKernel { name: "tile".to_owned(), block: [32, 1, 1], dynamic_shared_bytes: 0, source };
        let buffer = |bytes, contents| ExportedBuffer { bytes, contents };
        let buffers = vec![
            buffer(64, Contents::Operand(Operand::X)),
            buffer(8, Contents::Table(vec![1, 2])),
            buffer(600, Contents::State(vec![3; 150])),
            buffer(4, Contents::Scratch),
            buffer(64, Contents::Operand(Operand::Y)),
        ];
        let arguments = (0..5).map(|buffer| Argument { buffer, offset: 0, bytes: 4 }).collect();
        let launch = ExportedLaunch { kernel: 0, grid: [1, 1, 1], arguments, by_value: vec![0, 1] };
        LaunchList { kernels: vec![kernel], buffers, launches: vec![launch] }
    }

    #[test]
    fn buffers_lie_apart_and_states_twice() {
        let layout = Layout::of(&list()).unwrap();
        let places = [
            Place::Operand(Operand::X),
            Place::Own(0),
            Place::State { live: 512, pristine: 1536 },
            Place::Own(2560),
            Place::Operand(Operand::Y),
        ];
        assert_eq!(layout, Layout { places: places.to_vec(), bytes: 3072, alignment: 16 });
    }

    #[test]
    fn a_list_that_contradicts_itself_is_refused() {
        type Change = fn(&mut LaunchList);
        let changes: [(Change, &str); 10] = [
            (|list| list.launches[0].kernel = 1, "of kernel 1"),
            (|list| list.launches[0].arguments[0].buffer = 9, "beyond its buffer"),
            (|list| list.launches[0].arguments[0].offset = 61, "beyond its buffer"),
            (|list| list.launches[0].arguments[0].offset = u64::MAX, "beyond its buffer"),
            (|list| list.launches[0].grid[2] = 0, "blocks of"),
            (|list| list.kernels[0].block[1] = 33, "blocks of"),
            (|list| list.launches[0].by_value.push(1), "odd number"),
            (|list| list.buffers[1].bytes = 4, "8 bytes of contents"),
            (|list| list.buffers[4].contents = Contents::Operand(Operand::X), "both X"),
            (|list| list.buffers[3].bytes = u64::MAX, "longer than any memory"),
        ];
        for (change, said) in changes {
            let mut wrong = list();
            change(&mut wrong);
            let error = Layout::of(&wrong).expect_err(said).to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn lists_that_differ_in_tables_alone_are_one_graph_s() {
        let with = |change: fn(&mut LaunchList)| {
            let mut other = list();
            change(&mut other);
            difference(&list(), &other)
        };
        assert_eq!(with(|_| ()), None);
        assert_eq!(with(|list| list.buffers[1].contents = Contents::Table(vec![7, 8])), None);
        for change in [
            (|list| list.buffers[1].contents = Contents::Table(vec![7])) as fn(&mut LaunchList),
            |list| list.buffers[2].contents = Contents::State(vec![4; 150]),
            |list| list.buffers[0].bytes = 128,
            |list| list.launches[0].by_value[1] = 2,
            |list| list.launches[0].grid[0] = 2,
            |list| list.launches.clear(),
            |list| list.kernels[0].source.push(' '),
            |list| list.buffers.truncate(4),
        ] {
            assert!(with(change).is_some());
        }
    }
}
