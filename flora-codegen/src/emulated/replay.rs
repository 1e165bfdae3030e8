//! A batch's launches as they are exported, executed by the processor: what another program would get of them on a card.

use cubecl::server::IoError;
use cubecl_runtime::storage::{ComputeStorage, StorageHandle};
use flora_toolchain::CxxCompiler;

use super::memory::{Memory, Resource};
use super::program::{Program, ProgramError};
use crate::target::EmittedKernel;
use crate::target::export::{Argument, Contents, ExportedKernel, LaunchList, Operand};

/// A list whose kernels are compiled, with memory for its buffers.
pub(super) struct Replay<'a> {
    list: &'a LaunchList,
    programs: Vec<Program>,
    memory: Memory,
    buffers: Vec<StorageHandle>,
}

impl<'a> Replay<'a> {
    pub(super) fn new(compiler: &CxxCompiler, list: &'a LaunchList) -> Result<Self, ProgramError> {
        let program = |ExportedKernel { name, block, source }: &ExportedKernel| {
            let kernel =
                EmittedKernel { name: name.clone(), cube_dim: *block, cube_count: None, source: source.clone() };
            Program::new(compiler, &kernel, None)
        };
        let programs = list.kernels.iter().map(program).collect::<Result<_, _>>()?;
        let mut memory = Memory::default();
        let buffers = list.buffers.iter().map(|buffer| memory.alloc(buffer.bytes));
        let buffers = buffers.collect::<Result<_, IoError>>().expect("memory");
        let mut own = Self { list, programs, memory, buffers };
        for (position, buffer) in list.buffers.iter().enumerate() {
            // A card promises nothing about new memory: all ones are a NaN in every type.
            own.buffer(position).bytes().fill(0xff);
            if let Contents::Table(words) = &buffer.contents {
                own.write(position, bytemuck::cast_slice(words));
            }
        }
        Ok(own)
    }

    fn buffer(&mut self, position: usize) -> Resource {
        self.memory.get(&self.buffers[position])
    }

    fn write(&mut self, position: usize, bytes: &[u8]) {
        self.buffer(position).bytes()[..bytes.len()].copy_from_slice(bytes);
    }

    /// Puts an operand in its buffer, if the launches take it.
    pub(super) fn set(&mut self, operand: Operand, bytes: &[u8]) {
        if let Some((position, _, taken)) = self.list.operands().find(|(_, own, _)| *own == operand) {
            assert_eq!(bytes.len() as u64, taken, "{operand:?}");
            self.write(position, bytes);
        }
    }

    /// Makes the launches; y's bytes.
    pub(super) fn run(&mut self) -> Result<Vec<u8>, ProgramError> {
        for (position, buffer) in self.list.buffers.iter().enumerate() {
            if let Contents::State(words) = &buffer.contents {
                self.write(position, bytemuck::cast_slice(words));
            }
        }
        for launch in &self.list.launches {
            let resource = |Argument { buffer, offset, bytes }: &Argument| {
                let Resource { start, .. } = self.memory.get(&self.buffers[*buffer].offset_start(*offset));
                Resource { start, length: *bytes as usize }
            };
            let arguments: Vec<_> = launch.arguments.iter().map(resource).collect();
            let pairs = launch.by_value.chunks_exact(2);
            let by_value: Vec<_> = pairs.map(|halves| u64::from(halves[0]) | u64::from(halves[1]) << 32).collect();
            // SAFETY: the list says how long its buffers are, and what the kernel takes.
            unsafe { self.programs[launch.kernel].run(launch.grid, &arguments, &by_value)? };
        }
        let (position, _, _) = self.list.operands().find(|(_, own, _)| *own == Operand::Y).expect("y is written");
        Ok(self.buffer(position).bytes().to_vec())
    }
}
