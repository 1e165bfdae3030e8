//! The memory of the host's buffers: numbers that the host owns, or bytes that somebody lends it.

use std::sync::Arc;

use flora_plan::layer::Element;
use flora_runtime::{Buffer, Device, DeviceError, Storage};

use crate::owned::OwnedValues;
use crate::spare::{HostPlace, SpareValues};
use crate::values::{Values, ValuesMut};

/// Bytes that somebody else owns and doesn't change while a buffer has them.
pub type LentBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// What a host's buffer is made of.
#[derive(Clone)]
pub enum HostMemory {
    /// The host's own numbers.
    Owned(OwnedValues),
    /// Outputs, in memory that the host uses again.
    Spare(SpareValues),
    /// Somebody else's, to be read as numbers.
    Lent(LentBytes),
}

impl HostMemory {
    /// Writes over the host's own numbers, as [`OwnedValues::overwrite`].
    pub(crate) fn overwrite(&mut self, first: usize, numbers: &[f32]) -> bool {
        match self {
            Self::Owned(values) => values.overwrite(first, numbers),
            Self::Spare(values) => values.overwrite(first, numbers),
            Self::Lent(_) => false,
        }
    }

    /// The numbers; `None` where they are of another type, or bytes that can't be read as such numbers where they lie.
    pub(crate) fn values(&self, element: Element) -> Option<Values<'_>> {
        match self {
            Self::Owned(values) => Some(values.values()).filter(|values| values.element() == element),
            Self::Spare(values) => Some(values.values()).filter(|values| values.element() == element),
            Self::Lent(bytes) => {
                let bytes = bytes.as_ref().as_ref();
                Some(match element {
                    Element::F32 => Values::F32(bytemuck::try_cast_slice(bytes).ok()?),
                    Element::F16 => Values::F16(bytemuck::try_cast_slice(bytes).ok()?),
                    Element::Bf16 => Values::Bf16(bytemuck::try_cast_slice(bytes).ok()?),
                })
            }
        }
    }
}

/// The numbers of one of the host's buffers.
///
/// # Errors
/// A buffer of another device.
pub fn values(buffer: &Buffer) -> Result<Values<'_>, DeviceError> {
    let foreign = || foreign(buffer.element());
    let values = buffer.memory::<HostMemory>().ok_or_else(foreign)?.values(buffer.element()).ok_or_else(foreign)?;
    Ok(values.first(buffer.len()))
}

/// A buffer of these numbers, which are moved into it.
///
/// # Errors
/// Another device than the host.
pub fn buffer(device: &Device, values: OwnedValues) -> Result<Buffer, DeviceError> {
    let (count, element) = (values.values().len(), values.values().element());
    device.share(Storage::new(HostMemory::Owned(values)), count, element)
}

/// A buffer of `count` numbers, all of which `fill` has to write: before, they are whatever the memory's last use left.
///
/// # Errors
/// Another device than the host; what `fill` ends with.
pub fn filled<E: From<DeviceError>>(
    device: &Device,
    count: usize,
    element: Element,
    fill: impl FnOnce(ValuesMut<'_>) -> Result<(), E>,
) -> Result<Buffer, E> {
    let place = device.place::<HostPlace>().ok_or_else(|| foreign(element))?;
    let mut values = place.spare().take(count, element);
    fill(values.values_mut())?;
    Ok(device.share(Storage::new(HostMemory::Spare(values)), count, element)?)
}

/// A buffer of numbers that stay where they are and are not to be changed while it has them.
///
/// # Errors
/// Another device than the host; bytes that aren't whole numbers, or lie where such numbers can't be read.
pub fn lend(device: &Device, bytes: LentBytes, element: Element) -> Result<Buffer, DeviceError> {
    let count = bytes.as_ref().as_ref().len() / element.bytes() as usize;
    device.share(Storage::new(HostMemory::Lent(bytes)), count, element)
}

/// The numbers of one of the host's buffers, moved out of it where nothing else has it, else copied.
///
/// # Errors
/// A buffer of another device.
pub fn into_values(buffer: Buffer) -> Result<OwnedValues, DeviceError> {
    let (count, element) = (buffer.len(), buffer.element());
    match buffer.into_memory::<HostMemory>() {
        Ok(HostMemory::Owned(values)) => Ok(values.resized(count)),
        Ok(HostMemory::Spare(values)) => Ok(values.into_owned()),
        Ok(lent) => Ok(lent.values(element).ok_or_else(|| foreign(element))?.first(count).to_owned_values()),
        Err(shared) => Ok(values(&shared)?.to_owned_values()),
    }
}

pub(crate) fn foreign(element: Element) -> DeviceError {
    DeviceError::ForeignMemory { element, device: "host".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_whoever_owns_them() {
        let device = crate::device::device();
        let numbers = [1.0f32, -2.5, 3.0];
        let bytes: Vec<u8> = bytemuck::cast_slice(&numbers).to_vec();
        // Memory for floats, which a vector of bytes needn't be.
        let aligned: Arc<Vec<u32>> =
            Arc::new(bytes.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect());
        struct Words(Arc<Vec<u32>>);
        impl AsRef<[u8]> for Words {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        let lent = || lend(&device, Arc::new(Words(Arc::clone(&aligned))), Element::F32).unwrap();
        let owned = || buffer(&device, OwnedValues::F32(numbers.to_vec())).unwrap();
        for made in [lent(), owned()] {
            let shared = made.clone();
            for buffer in [made, shared] {
                let Ok(OwnedValues::F32(values)) = into_values(buffer) else { panic!("f32 went in") };
                assert_eq!(values, numbers);
            }
        }
    }

    #[test]
    fn bytes_that_are_no_numbers_are_refused() {
        let device = crate::device::device();
        let bytes: Arc<Vec<u32>> = Arc::new(vec![0; 4]);
        struct Odd(Arc<Vec<u32>>);
        impl AsRef<[u8]> for Odd {
            fn as_ref(&self) -> &[u8] {
                &bytemuck::cast_slice(&self.0)[1..6]
            }
        }
        assert!(lend(&device, Arc::new(Odd(bytes)), Element::F32).is_err());
    }
}
