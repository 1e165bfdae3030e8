//! `CUresult` and `nvrtcResult`, as far as they are given here.

use std::ffi::{CStr, c_int};

/// `CUresult`.
pub(crate) type Status = c_int;

macro_rules! statuses {
    ($($name:ident = $value:literal $text:literal;)*) => {
        $(pub(crate) const $name: Status = $value;)*

        /// The name of a status.
        pub(crate) fn name(status: Status) -> Option<&'static CStr> {
            match status {
                $($value => Some($text),)*
                _ => None,
            }
        }
    };
}

statuses! {
    SUCCESS = 0 c"CUDA_SUCCESS";
    INVALID_VALUE = 1 c"CUDA_ERROR_INVALID_VALUE";
    OUT_OF_MEMORY = 2 c"CUDA_ERROR_OUT_OF_MEMORY";
    NOT_INITIALIZED = 3 c"CUDA_ERROR_NOT_INITIALIZED";
    INVALID_DEVICE = 101 c"CUDA_ERROR_INVALID_DEVICE";
    INVALID_IMAGE = 200 c"CUDA_ERROR_INVALID_IMAGE";
    INVALID_CONTEXT = 201 c"CUDA_ERROR_INVALID_CONTEXT";
    NO_BINARY_FOR_GPU = 209 c"CUDA_ERROR_NO_BINARY_FOR_GPU";
    INVALID_HANDLE = 400 c"CUDA_ERROR_INVALID_HANDLE";
    NOT_FOUND = 500 c"CUDA_ERROR_NOT_FOUND";
    ILLEGAL_ADDRESS = 700 c"CUDA_ERROR_ILLEGAL_ADDRESS";
    LAUNCH_FAILED = 719 c"CUDA_ERROR_LAUNCH_FAILED";
    CAPTURE_UNSUPPORTED = 900 c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
    CAPTURE_INVALIDATED = 901 c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
}
