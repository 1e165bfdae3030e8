//! The policy by itself: the disk and the device are the test.
