//! The C interface: `include/flora.h` says what each function does.
//!
//! Layers are numbers and no pointers, so that one that was freed is an error and not a crash. A function that fails gives a code, and
//! `flora_last_error` says what was wrong. No panic leaves a function: it is a code, too.
#![allow(unsafe_code, reason = "that no other library exports these names is the linker's to know")]

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_char, c_int};
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use flora_checkpoint::{AdapterFolder, Operand};
use flora_plan::layer::Element;

use crate::error::Error;
use crate::kinds::{self, Shard};
use crate::linear::{Linear, LinearParts, open};
use crate::memory::{self, NumberType, RowsAt, Tensor};
use crate::step::RowSlots;
use crate::threads;

/// What a function gives: the codes of the header.
#[derive(Clone, Copy)]
enum Code {
    Ok = 0,
    Invalid = 1,
    Closed = 2,
    Failed = 3,
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Layers that this interface's users have not freed.
static HELD: Mutex<Option<HashMap<i64, Arc<Linear>>>> = Mutex::new(None);

/// `flora_tensor`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FloraTensor {
    data: usize,
    element: c_int,
    extents: c_int,
    shape: [i64; 2],
    strides: [i64; 2],
}

/// `flora_operand`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FloraOperand {
    name: *const c_char,
    tensor: FloraTensor,
}

/// Runs a function's work and turns what comes of it into a code.
fn answer(work: impl FnOnce() -> Result<(), Error> + std::panic::UnwindSafe) -> c_int {
    let (code, said) = match catch_unwind(work) {
        Ok(Ok(())) => return Code::Ok as c_int,
        Ok(Err(error)) => {
            let code = match &error {
                Error::Closed(_) => Code::Closed,
                Error::Threads { .. } | Error::Device(_) => Code::Failed,
                _ => Code::Invalid,
            };
            (code, error.to_string())
        }
        Err(_) => {
            (Code::Failed, "flora has a defect: a call panicked; what it said is on the standard error".to_owned())
        }
    };
    let said = CString::new(said.replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.with_borrow_mut(|last| *last = said);
    code as c_int
}

fn element(code: c_int, what: &str) -> Result<NumberType, Error> {
    match code {
        0 => Ok(NumberType::Element(Element::F32)),
        1 => Ok(NumberType::Element(Element::F16)),
        2 => Ok(NumberType::Element(Element::Bf16)),
        3 => Ok(NumberType::F64),
        _ => {
            let expected = "FLORA_F32, FLORA_F16, FLORA_BF16 or FLORA_F64".to_owned();
            Err(Error::Type { what: what.to_owned(), found: format!("of the type {code}"), expected })
        }
    }
}

fn tensor(own: &FloraTensor, what: &str) -> Result<Tensor, Error> {
    let negative = || Error::shape(what, format!("has the shape {:?}", own.shape));
    let count = usize::try_from(own.extents)
        .ok()
        .filter(|count| *count <= own.shape.len())
        .ok_or_else(|| Error::shape(what, format!("has {} extents; there are 2 at most", own.extents)))?;
    let shape = own.shape[..count].iter().map(|extent| usize::try_from(*extent).map_err(|_| negative()));
    let strides = own.strides[..count].iter().map(|stride| isize::try_from(*stride).map_err(|_| negative()));
    Ok(Tensor {
        address: own.data,
        numbers: element(own.element, what)?,
        shape: shape.collect::<Result<_, _>>()?,
        strides: strides.collect::<Result<_, _>>()?,
    })
}

fn number(what: &'static str, value: i64) -> Result<usize, Error> {
    usize::try_from(value).map_err(|_| Error::shape(what, format!("are {value}")))
}

fn slot_and_part(slot: i64, part: i64) -> Result<(u32, usize), Error> {
    let missing = |what, number: i64| Error::NoSuch { what, number: number.unsigned_abs(), count: 0 };
    let slot = u32::try_from(slot).map_err(|_| missing("slot", slot))?;
    Ok((slot, usize::try_from(part).map_err(|_| missing("part", part))?))
}

/// What the last call of this thread that failed said; valid until the next one that fails.
#[unsafe(no_mangle)]
pub extern "C" fn flora_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|last| last.as_ptr())
}

/// Computes with so many threads.
#[unsafe(no_mangle)]
pub extern "C" fn flora_set_num_threads(count: i64) -> c_int {
    answer(|| threads::set(number("the threads", count)?))
}

/// Makes a layer.
#[unsafe(no_mangle)]
pub extern "C" fn flora_linear_new(
    weight: Option<&FloraTensor>,
    bias: Option<&FloraTensor>,
    parts: usize,
    part_count: i64,
    slots: i64,
    activations: c_int,
    handle: Option<&mut i64>,
) -> c_int {
    let (weight, bias) = (weight.copied(), bias.copied());
    let mut made = 0;
    let place = &mut made;
    let code = answer(std::panic::AssertUnwindSafe(|| {
        let weight = weight.ok_or_else(|| Error::shape("the weight", "is null"))?;
        let weight = tensor(&weight, "the weight")?;
        let bias = bias.map(|bias| tensor(&bias, "the bias")).transpose()?;
        let sizes = memory::slots(parts, number("the parts", part_count)?)?;
        let sizes: Vec<usize> = sizes.iter().map(|size| number("the parts", *size)).collect::<Result<_, _>>()?;
        let NumberType::Element(activations) = element(activations, "the activations")? else {
            let (what, found) = ("the activations".to_owned(), "FLORA_F64".to_owned());
            return Err(Error::Type { what, found, expected: "FLORA_F32, FLORA_F16 or FLORA_BF16".to_owned() });
        };
        let slots = u32::try_from(slots).map_err(|_| Error::shape("the slots", format!("are {slots}")))?;
        let linear = Linear::new(&LinearParts {
            weight: &weight,
            bias: bias.as_ref(),
            parts: Some(&sizes[..]).filter(|sizes| !sizes.is_empty()),
            slots,
            activations: Some(activations),
        })?;
        *place = linear.handle();
        HELD.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().insert(linear.handle(), linear);
        Ok(())
    }));
    if let Some(handle) = handle {
        *handle = made;
    }
    code
}

/// Frees a layer.
#[unsafe(no_mangle)]
pub extern "C" fn flora_linear_free(layer: i64) -> c_int {
    answer(|| {
        let held = HELD.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(|held| held.remove(&layer));
        held.map(drop).ok_or(Error::Closed(layer))
    })
}

/// Puts an adapter's operands into a slot.
#[unsafe(no_mangle)]
pub extern "C" fn flora_linear_put(
    layer: i64,
    slot: i64,
    part: i64,
    kind: *const c_char,
    operands: *const FloraOperand,
    count: i64,
) -> c_int {
    answer(|| {
        let (linear, place) = (open(layer)?, slot_and_part(slot, part)?);
        let kind = memory::text("the kind", kind)?;
        let mut own = BTreeMap::new();
        for operand in memory::operands(operands, number("the operands", count)?)? {
            let name = memory::text("an operand's name", operand.name)?;
            let what = format!("the operand `{name}`");
            let tensor = tensor(&operand.tensor, &what)?;
            let values = tensor.to_f32(&what)?;
            own.insert(name.to_owned(), Operand { shape: tensor.shape, values });
        }
        let (folder, path) = kinds::of_operands(kind, own)?;
        linear.put(place, &folder, &path, &Shard::default())
    })
}

/// Puts a module of an adapter's folder into a slot.
#[unsafe(no_mangle)]
pub extern "C" fn flora_linear_put_folder(
    layer: i64,
    slot: i64,
    part: i64,
    folder: *const c_char,
    module: *const c_char,
) -> c_int {
    answer(|| {
        let (linear, place) = (open(layer)?, slot_and_part(slot, part)?);
        let folder = memory::text("the folder", folder)?;
        let adapter = AdapterFolder::open(Path::new(folder), kinds::layers()?.kinds())?;
        linear.put(place, &adapter, memory::text("the module", module)?, &Shard::default())
    })
}

/// Empties a slot of one part, or of all where the part is -1.
#[unsafe(no_mangle)]
pub extern "C" fn flora_linear_clear(layer: i64, slot: i64, part: i64) -> c_int {
    answer(|| {
        let linear = open(layer)?;
        match part {
            -1 => linear.clear(slot_and_part(slot, 0)?.0, None),
            part => slot_and_part(slot, part).and_then(|(slot, part)| linear.clear(slot, Some(part))),
        }
    })
}

/// Computes a batch.
#[unsafe(no_mangle)]
pub extern "C" fn flora_linear_forward(
    layer: i64,
    x: usize,
    x_stride: i64,
    slots: usize,
    rows: i64,
    y: usize,
    y_stride: i64,
) -> c_int {
    answer(|| {
        let (linear, rows) = (open(layer)?, number("the rows", rows)?);
        let (x_stride, y_stride) = (number("the strides", x_stride)?, number("the strides", y_stride)?);
        let activations = linear.activations();
        let x = RowsAt { address: x, rows, width: linear.inputs(), pitch: x_stride }.read("x", activations)?;
        let y = RowsAt { address: y, rows, width: linear.outputs(), pitch: y_stride }.write("y", activations)?;
        let slots = match slots {
            0 => RowSlots::All { slot: -1, rows },
            address => RowSlots::Each(memory::slots(address, rows)?),
        };
        linear.forward(x, slots, y)
    })
}
