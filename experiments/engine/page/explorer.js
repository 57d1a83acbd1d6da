// GD and SGD on linear regression with two parameters, in float64: what `jaxgrad` computes, for the page to draw.
//
// Loss L(w) = (1/n) Σ (yᵢ − xᵢ·w)², x[n, 2] row by row. The names, formulas and ids are those of jaxgrad/sampling.py
// and jaxgrad/theory/least_squares.py; tests/experiments/test_page.py runs this file against them: the same key gives the same
// indices, the same indices the same path, and the exact curves agree.
"use strict";

const explorer = (() => {
  // --- which examples a step sees (F5): jaxgrad/sampling.py ------------------------------------------------------

  const EXACT_UP_TO = 64;
  const NETWORKS = 5;

  // A 32-bit mix of value and key (MurmurHash3), as an unsigned integer.
  function hash(x, key) {
    x = (Math.imul(x ^ key, 0x9e3779b1) + key) | 0;
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    return (x ^ (x >>> 16)) >>> 0;
  }

  // ⌊word · m / 2³²⌋ for m < 2³¹; the product has more bits than a number, so it is made of two.
  function scaled(word, m) {
    return Math.floor(((word >>> 16) * m + Math.floor(((word & 0xffff) * m) / 65536)) / 65536);
  }

  // 64 random bits for one step or pass. `key` is the pair of words of a JAX key: jax.random.key(seed) is [0, seed].
  function stream(key, index) {
    const [first, last] = key;
    return [hash(hash(index, first), last), hash(hash(index, ~last), first)];
  }

  function words(bits, count) {
    return Uint32Array.from({ length: count }, (_, i) => hash(hash(i, bits[0]), bits[1]));
  }

  // p, q near √n with pq <= n and as little left over as possible.
  function grid(n) {
    const root = Math.floor(Math.sqrt(n));
    let p = root;
    for (let other = root; other >= Math.floor((3 * root) / 4); other--) if (n % other < n % p) p = other;
    return [p, Math.floor(n / p)];
  }

  function added(x, shift, m) {
    const moved = x + shift;
    return moved >= m ? moved - m : moved;
  }

  // π(first), …, π(first + b − 1) for the random permutation π of [0, n) that `bits` determine.
  function permuted(bits, first, b, n) {
    const out = new Int32Array(b);
    if (n <= EXACT_UP_TO) {
      const drawn = words(bits, n);
      for (let k = 0; k < b; k++) for (const word of drawn) out[k] += word < drawn[first + k] ? 1 : 0;
      return out;
    }
    const [p, q] = grid(n);
    const keys = words(bits, 3 * NETWORKS);
    for (let k = 0; k < b; k++) {
      let x = first + k;
      for (let i = 0; i < NETWORKS; i++) {
        if (x < p * q) {
          let l = Math.floor(x / q);
          let r = x % q;
          l = added(l, scaled(hash(r, keys[3 * i]), p), p);
          r = added(r, scaled(hash(l, keys[3 * i + 1]), q), q);
          x = l * q + r;
        }
        x = added(x, scaled(keys[3 * i + 2], n), n);
      }
      out[k] = x;
    }
    return out;
  }

  // The indices of one step; `sampling` is {kind, b}, with kind one of "full batch", "with replacement", "distinct"
  // and "reshuffled".
  function indices(sampling, key, step, n) {
    const { kind, b } = sampling;
    if (kind === "full batch") return Int32Array.from({ length: n }, (_, i) => i);
    if (kind === "distinct" && b > 1) return permuted(stream(key, step), 0, b, n);
    if (kind === "reshuffled") {
      const stepsPerPass = Math.floor(n / b);
      return permuted(stream(key, Math.floor(step / stepsPerPass)), (step % stepsPerPass) * b, b, n);
    }
    const drawn = words(stream(key, step), 2 * b);
    return Int32Array.from({ length: b }, (_, k) => {
      const carry = scaled(drawn[b + k], n);
      const total = (Math.imul(drawn[k], n) + carry) >>> 0;
      return scaled(drawn[k], n) + (total < carry ? 1 : 0);
    });
  }

  // Cov[g_B] = γ Σ. Batches of a reshuffled pass depend on each other: γ does not tell all of them.
  function gamma({ kind, b }, n) {
    if (kind === "full batch") return 0;
    return kind === "with replacement" ? 1 / b : n === 1 ? 0 : (n - b) / (b * (n - 1));
  }

  // --- the problem and its geometry: jaxgrad/theory/least_squares.py --------------------------------------------

  // Hessian H = (2/n) XᵀX, minimiser w*, minimum L*, residuals rᵢ, eigenvalues λ (largest first) and directions.
  function problem(x, y) {
    const n = y.length;
    let [a, b, c, u, v] = [0, 0, 0, 0, 0];
    for (let i = 0; i < n; i++) {
      const [p, q] = [x[2 * i], x[2 * i + 1]];
      a += p * p; b += p * q; c += q * q; u += p * y[i]; v += q * y[i];
    }
    const determinant = a * c - b * b;
    const minimiser = [(c * u - b * v) / determinant, (a * v - b * u) / determinant];
    const residuals = Float64Array.from(y, (t, i) => t - x[2 * i] * minimiser[0] - x[2 * i + 1] * minimiser[1]);
    const half = Math.hypot((a - c) / 2, b);
    const eigenvalues = [(2 / n) * ((a + c) / 2 + half), ((2 / n) * determinant) / ((a + c) / 2 + half)];
    const angle = 0.5 * Math.atan2(2 * b, a - c);
    return {
      x, y, n, minimiser, residuals, eigenvalues,
      hessian: [[(2 * a) / n, (2 * b) / n], [(2 * b) / n, (2 * c) / n]],
      value: residuals.reduce((sum, r) => sum + r * r, 0) / n,
      directions: [[Math.cos(angle), Math.sin(angle)], [-Math.sin(angle), Math.cos(angle)]],
    };
  }

  // L(w) − L* = ½ (w − w*)ᵀ H (w − w*)
  function gap({ hessian: H, minimiser }, w) {
    const [u, v] = [w[0] - minimiser[0], w[1] - minimiser[1]];
    return 0.5 * (H[0][0] * u * u + 2 * H[0][1] * u * v + H[1][1] * v * v);
  }

  // GD converges if and only if η is below 2/λmax.
  function edge({ eigenvalues }) {
    return 2 / eigenvalues[0];
  }

  // The η beyond which the mean gap of SGD explodes: 2/λmax(D, C), on symmetric 2 × 2 matrices M as three numbers,
  // C(M) = (HM + MH)/2, D(M) = (1 − γ) HMH + γ (1/n) Σ HᵢMHᵢ with Hᵢ = 2xᵢxᵢᵀ.
  function sgdEdge(prob, sampling) {
    const { x, n, eigenvalues: lam, directions: V } = prob;
    const factor = gamma(sampling, n);
    if (factor === 0) return edge(prob);
    const pairs = [[0, 0], [1, 1], [0, 1]];
    const D = [[0, 0, 0], [0, 0, 0], [0, 0, 0]];
    for (let i = 0; i < n; i++) {
      const z = V.map((v) => v[0] * x[2 * i] + v[1] * x[2 * i + 1]);
      // 2 zzᵀ in an orthonormal basis of symmetric matrices, where the entry off the diagonal counts √2 times.
      const f = [2 * z[0] * z[0], 2 * z[1] * z[1], 2 * Math.SQRT2 * z[0] * z[1]];
      for (let j = 0; j < 3; j++) for (let k = 0; k < 3; k++) D[j][k] += (factor * f[j] * f[k]) / n;
    }
    const C = pairs.map(([i, j]) => (lam[i] + lam[j]) / 2);
    pairs.forEach(([i, j], k) => { D[k][k] += (1 - factor) * lam[i] * lam[j]; });
    return 2 / largestEigenvalue(D.map((row, j) => row.map((d, k) => d / Math.sqrt(C[j] * C[k]))));
  }

  // Of a symmetric positive matrix, by squaring it until nothing else is left of it.
  function largestEigenvalue(A) {
    let P = A;
    for (let round = 0; round < 40; round++) {
      const largest = Math.max(...P.flat());
      const S = P.map((row) => row.map((p) => p / largest));
      P = S.map((row) => S[0].map((_, k) => row.reduce((sum, p, j) => sum + p * S[j][k], 0)));
    }
    const v = P.map((row) => row.reduce((sum, p) => sum + p, 0));
    const Av = A.map((row) => row.reduce((sum, a, j) => sum + a * v[j], 0));
    return v.reduce((sum, p, j) => sum + p * Av[j], 0) / v.reduce((sum, p) => sum + p * p, 0);
  }

  // --- runs and what is expected of them -------------------------------------------------------------------------

  // w₀, …, w_steps as [w₁, w₂, w₁, w₂, …]: w ← w + (2η/b) Σ (yⱼ − xⱼ·w) xⱼ (F4, F6).
  function path(prob, start, eta, sampling, key, steps) {
    const { x, y, n } = prob;
    const out = new Float64Array(2 * (steps + 1));
    out.set(start);
    let [u, v] = start;
    const everyone = sampling.kind === "full batch" ? indices(sampling, key, 0, n) : null;
    for (let step = 0; step < steps; step++) {
      const batch = everyone || indices(sampling, key, step, n);
      let [p, q] = [0, 0];
      for (let k = 0; k < batch.length; k++) {
        const j = batch[k];
        const error = y[j] - x[2 * j] * u - x[2 * j + 1] * v;
        p += error * x[2 * j];
        q += error * x[2 * j + 1];
      }
      u += (2 * eta * p) / batch.length;
      v += (2 * eta * q) / batch.length;
      out[2 * step + 2] = u;
      out[2 * step + 3] = v;
    }
    return out;
  }

  function gaps(prob, points) {
    return Float64Array.from({ length: points.length / 2 }, (_, t) => gap(prob, [points[2 * t], points[2 * t + 1]]));
  }

  // E[L(w_t)] − L* at t = 0 … steps, exactly, for fresh batches; null for a reshuffled pass. With m = E[d], M = E[ddᵀ]:
  // M ← (I − ηH) M (I − ηH) + η²γ [(4/n) Xᵀ diag(e) X − HMH],   eᵢ = rᵢ² − 2 rᵢ xᵢ·m + xᵢᵀM xᵢ,   m ← (I − ηH) m.
  function expectedGaps(prob, start, eta, sampling, steps) {
    if (sampling.kind === "reshuffled") return null;
    const { x, n, hessian: H, residuals } = prob;
    const factor = gamma(sampling, n);
    const A = [[1 - eta * H[0][0], -eta * H[0][1]], [-eta * H[0][1], 1 - eta * H[1][1]]];
    let m = [start[0] - prob.minimiser[0], start[1] - prob.minimiser[1]];
    let M = [m[0] * m[0], m[0] * m[1], m[1] * m[1]];
    const out = new Float64Array(steps + 1);
    const congruent = (B, [a, b, c]) => [
      B[0][0] * B[0][0] * a + 2 * B[0][0] * B[0][1] * b + B[0][1] * B[0][1] * c,
      B[0][0] * B[1][0] * a + (B[0][0] * B[1][1] + B[0][1] * B[1][0]) * b + B[0][1] * B[1][1] * c,
      B[1][0] * B[1][0] * a + 2 * B[1][0] * B[1][1] * b + B[1][1] * B[1][1] * c,
    ];
    for (let t = 0; t <= steps; t++) {
      out[t] = 0.5 * (H[0][0] * M[0] + 2 * H[0][1] * M[1] + H[1][1] * M[2]);
      const noise = [0, 0, 0];
      if (factor > 0) {
        for (let i = 0; i < n; i++) {
          const [p, q, r] = [x[2 * i], x[2 * i + 1], residuals[i]];
          const e = r * r - 2 * r * (p * m[0] + q * m[1]) + p * p * M[0] + 2 * p * q * M[1] + q * q * M[2];
          noise[0] += e * p * p; noise[1] += e * p * q; noise[2] += e * q * q;
        }
      }
      const HMH = congruent(H, M);
      M = congruent(A, M).map((s, k) => s + eta * eta * factor * ((4 / n) * noise[k] - HMH[k]));
      m = [A[0][0] * m[0] + A[0][1] * m[1], A[1][0] * m[0] + A[1][1] * m[1]];
    }
    return out;
  }

  // The first step whose gap is more than `times` that of the start, or is no number; -1 if there is none.
  function divergedAt(curve, times) {
    return curve.findIndex((value) => !(value <= times * curve[0]));
  }

  // The quantile `share` of sorted values, between neighbours as NumPy has it.
  function quantile(sorted, share) {
    const place = share * (sorted.length - 1);
    const low = Math.floor(place);
    const next = sorted[Math.min(low + 1, sorted.length - 1)];
    return place === low ? sorted[low] : sorted[low] + (place - low) * (next - sorted[low]);
  }

  return {
    hash, scaled, indices, gamma, problem, gap, edge, sgdEdge, path, gaps, expectedGaps, divergedAt, quantile,
  };
})();

if (typeof module !== "undefined") module.exports = explorer;
