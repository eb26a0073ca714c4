//! How messages go over the wire: as tonic's own codec does it, with other buffers.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{self, BufferSettings};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// What nearly all messages have room in; a longer one gets more. Each call takes a buffer for either way, and those of tonic's
/// default, 8 KiB, lie so that they drive each other out of the processor's cache.
const BUFFER_BYTES: usize = 1 << 10;
/// Messages of a stream are gathered in one frame until it has so many bytes; tonic's default.
const YIELD_AT_BYTES: usize = 32 << 10;

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_AT_BYTES)
}

/// The codec of the generated client and server.
#[derive(Debug)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + 'static, U: Message + Default + 'static> codec::Codec for Codec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> ProstEncoder<T> {
        ProstEncoder::new(buffers())
    }

    fn decoder(&mut self) -> ProstDecoder<U> {
        ProstDecoder::new(buffers())
    }
}
