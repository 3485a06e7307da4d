//! The MTP layer's part of a step (DeepSeek-V3 report 2.2): its cache entries, from the trunk's states and the tokens after.
//!
//! An entry needs only the layer's input and its latent projection, so filling the cache costs two products; the rest of
//! the layer runs when tokens are drafted.

use kernels::{
    Backend, Tensor,
    backend::{Columns, Input, Output},
};

use crate::{
    config::LATENT_NORM_EPS,
    error::Result,
    network::Network,
    scratch::{MtpBuffers, Scratch, put},
    weights::{Mtp, Projection},
};

impl<B: Backend> Network<B> {
    /// `residual = eh_proj [ norm(embedding of the next token) | norm(state) ]` for the planned MTP rows, in place of the
    /// step's residual stream.
    pub(crate) fn mtp_input(&self, scratch: &mut Scratch<B>, mtp: &Mtp<B>) -> Result<()> {
        let (backend, eps) = (&*self.backend, self.config.rms_norm_eps);
        let Scratch {
            stream,
            plan,
            states,
            residual,
            mtp: buffers,
            ..
        } = scratch;
        let (rows, buffers) = (plan.mtp.rows(), planned(buffers));
        put(backend, stream, &plan.mtp.states, &mut buffers.index)?;
        put(backend, stream, &plan.mtp.tokens, &mut buffers.tokens)?;
        let (hidden, embedded) = (&mut buffers.hidden, &mut buffers.embedded);
        backend.gather(stream, states, &buffers.index, rows, hidden)?;
        backend.embed(
            stream,
            &self.trunk.embedding,
            &buffers.tokens,
            rows,
            embedded,
        )?;
        let hidden_normed = &mut buffers.hidden_normed;
        let (input, out) = (all(hidden), plain(hidden_normed));
        backend.norm(stream, input, &mtp.hidden_norm, eps, rows, out)?;
        // The gathered states are not needed any more: their buffer takes the normalised embedding.
        let (input, out) = (all(embedded), plain(hidden));
        backend.norm(stream, input, &mtp.embedding_norm, eps, rows, out)?;
        backend.concat(stream, hidden, hidden_normed, rows, &mut buffers.joined)?;
        let joined = Input::Plain(&buffers.joined);
        Ok(backend.matmul(stream, joined, &mtp.eh_proj.weight, rows, residual)?)
    }

    /// Latent and rope key of the planned MTP rows into the MTP layer's cache.
    pub(crate) fn fill_mtp(
        &self,
        scratch: &mut Scratch<B>,
        mtp: &Mtp<B>,
        cache: &B::Cache,
    ) -> Result<()> {
        let (backend, eps, rows) = (
            &*self.backend,
            self.config.rms_norm_eps,
            scratch.plan.mtp.rows(),
        );
        if rows == 0 {
            return Ok(());
        }
        self.mtp_input(scratch, mtp)?;
        let Scratch {
            stream,
            plan,
            residual,
            normed,
            qkv_a,
            mtp: buffers,
            ..
        } = scratch;
        let buffers = planned(buffers);
        put(backend, stream, &plan.mtp.slots, &mut buffers.seqs.slots)?;
        put(
            backend,
            stream,
            &plan.mtp.positions,
            &mut buffers.seqs.positions,
        )?;
        let layer = &mtp.layer;
        let (weights, first) = match &layer.attention.projection {
            Projection::LowRank { qkv_a, q_norm, .. } => (qkv_a, q_norm.cols),
            Projection::Direct { kv_a, .. } => (kv_a, 0),
        };
        let out = normed.output_for(weights);
        backend.add_norm(stream, residual, None, &layer.input_norm, eps, rows, out)?;
        let input = normed.input(weights.quantised);
        backend.matmul(stream, input, &weights.weight, rows, qkv_a)?;
        Ok(backend.cache_write(
            stream,
            Columns {
                tensor: qkv_a,
                first,
                cols: self.config.attention.entry(),
            },
            &layer.attention.kv_norm,
            LATENT_NORM_EPS,
            &self.rope_table,
            &buffers.seqs,
            self.config.layers,
            rows,
            cache,
        )?)
    }

    /// Puts the last states of the step's sequences into their rows.
    pub(crate) fn keep_states(&self, scratch: &mut Scratch<B>) -> Result<()> {
        let (backend, rows) = (&*self.backend, scratch.plan.keep_from.len());
        if rows == 0 {
            return Ok(());
        }
        let Scratch {
            stream,
            plan,
            states,
            index,
            picked,
            ..
        } = scratch;
        put(backend, stream, &plan.keep_from, index)?;
        backend.gather(stream, states, index, rows, picked)?;
        put(backend, stream, &plan.keep_to, index)?;
        Ok(backend.scatter(stream, picked, index, rows, states)?)
    }
}

fn planned<B: Backend>(buffers: &mut Option<MtpBuffers<B>>) -> &mut MtpBuffers<B> {
    buffers
        .as_mut()
        .expect("planned when the MTP layer is loaded")
}

fn all<M>(tensor: &Tensor<M>) -> Columns<'_, M> {
    Columns {
        tensor,
        first: 0,
        cols: tensor.cols,
    }
}

fn plain<M>(tensor: &mut Tensor<M>) -> Output<'_, M> {
    Output {
        plain: Some(tensor),
        quantised: None,
    }
}
