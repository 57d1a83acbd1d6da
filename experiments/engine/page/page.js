// The explorer's controls and drawings. What is computed is in explorer.js; nothing is loaded from anywhere.
"use strict";

(() => {
  const at = (id) => document.getElementById(id);
  const given = JSON.parse(at("explorer-data").textContent);
  const problem = explorer.problem(given.x, given.y);
  const edge = explorer.edge(problem);
  const startGap = explorer.gap(problem, given.start);
  const SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, problem.n];
  const SHOWN = 3; // runs drawn one by one; all of them make the band
  const FAR = 10; // times the gap of the start: out of the bowl
  const MOTION = !window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  let firstSeed = 0;
  let turn = 0; // what was begun for an earlier setting ends when this moves on
  let state = null;

  // --- controls --------------------------------------------------------------------------------------------------

  function settings() {
    const kind = document.querySelector('input[name="sampling"]:checked').value;
    const fraction = 10 ** Number(at("eta").value);
    const b = kind === "full batch" ? problem.n : SIZES[Number(at("batch").value)];
    return { fraction, eta: fraction * edge, sampling: { kind, b }, steps: Number(at("steps").value) };
  }

  function tell(chosen) {
    const { fraction, eta, sampling } = chosen;
    const times = `${digits(fraction)} × the edge`;
    at("eta-out").textContent = `${times} (η = ${digits(eta)})`;
    at("eta").setAttribute("aria-valuetext", times);
    const all = sampling.b === problem.n ? " (all)" : "";
    at("batch-out").textContent = `${sampling.b}${all}`;
    at("batch").setAttribute("aria-valuetext", `${sampling.b}${all}`);
    at("batch").disabled = sampling.kind === "full batch";
  }

  // --- runs ------------------------------------------------------------------------------------------------------

  // GD and what is exact at once; then runs of SGD, a few milliseconds of every frame, so that nothing ever stalls.
  function begin(animate) {
    const mine = ++turn;
    const chosen = settings();
    tell(chosen);
    const { eta, sampling, steps } = chosen;
    const noisy = sampling.kind !== "full batch";
    const gd = explorer.path(problem, given.start, eta, { kind: "full batch" }, [0, 0], steps);
    // Passes over so many examples have no exact mean to draw: fresh draws of as many are there to compare.
    const fresh = { ...sampling, kind: sampling.kind === "reshuffled" ? "distinct" : sampling.kind };
    const exact = noisy ? explorer.expectedGaps(problem, given.start, eta, fresh, steps) : null;
    const wanted = noisy ? Math.round(Math.min(200, Math.max(20, 2.5e6 / (steps * sampling.b)))) : 0;
    const sgdEdge = noisy && sampling.kind !== "reshuffled" ? explorer.sgdEdge(problem, sampling) : null;
    state = { ...chosen, gd, gdGaps: explorer.gaps(problem, gd), exact, sgdEdge, wanted, runs: [], band: null };
    at("explorer").setAttribute("aria-busy", "true");
    const began = performance.now();
    const frame = () => {
      if (mine !== turn) return;
      const until = performance.now() + 9;
      while (state.runs.length < wanted && performance.now() < until) {
        const key = [0, firstSeed + state.runs.length];
        const points = explorer.path(problem, given.start, eta, sampling, key, steps);
        state.runs.push({ points, gaps: explorer.gaps(problem, points) });
      }
      const share = animate ? Math.min(1, (performance.now() - began) / 2500) : 1;
      const done = state.runs.length === wanted;
      if (done && wanted && !state.band) state.band = quantiles(state.runs, steps);
      draw(Math.max(1, Math.round(share * steps)));
      if (done && share === 1) finish();
      else requestAnimationFrame(frame);
    };
    frame();
  }

  function quantiles(runs, steps) {
    const low = new Float64Array(steps + 1);
    const high = new Float64Array(steps + 1);
    const values = new Float64Array(runs.length);
    for (let t = 0; t <= steps; t++) {
      runs.forEach((run, k) => { values[k] = Number.isNaN(run.gaps[t]) ? Infinity : run.gaps[t]; });
      values.sort();
      low[t] = explorer.quantile(values, 0.1);
      high[t] = explorer.quantile(values, 0.9);
    }
    return { low, high };
  }

  function finish() {
    at("said").textContent = words();
    at("explorer").setAttribute("aria-busy", "false");
  }

  // --- what is seen, in words ------------------------------------------------------------------------------------

  function words() {
    const { fraction, gdGaps, exact, sgdEdge, runs, band, steps, sampling } = state;
    const left = leaves(gdGaps);
    const said = [];
    if (fraction > 1) {
      const when = left < 0 ? `within ${steps} steps it is not out yet` : `at step ${left} it is out of the bowl`;
      said.push(`GD diverges: the step size is beyond the edge 2/λmax, and ${when} (gap ${FAR} times the start's).`);
    } else {
      const share = gdGaps[steps] / startGap;
      const slow = share > 0.05 ? " It crawls." : "";
      said.push(`GD: after ${steps} steps the loss is ${percent(share)} as far above its minimum as at the start.${slow}`);
    }
    if (runs.length) {
      const middle = `the middle 80 % of ${runs.length} runs lie between ${digits(band.low[steps])} and ${digits(band.high[steps])}`;
      said.push(
        sampling.kind === "reshuffled"
          ? `SGD: after ${steps} steps ${middle}. Passes over so many examples have no exact mean to draw: the dashed ` +
            `line, which ends at ${digits(exact[steps])}, is that of as many distinct examples drawn afresh each step.`
          : `SGD: after ${steps} steps the mean gap is ${digits(exact[steps])}, exactly, and ${middle}.`,
      );
      const rose = runs.filter((run) => explorer.divergedAt(run.gaps, FAR) >= 0).length;
      const gone = runs.filter((run) => leaves(run.gaps) >= 0).length;
      if (rose) said.push(`${rose} of ${runs.length} runs rose above ${FAR} times the start's gap, and ${gone} ended there.`);
    }
    if (sampling.b === problem.n && sampling.kind === "distinct") said.push("All examples at once, each once: this is GD.");
    else if (sgdEdge !== null && fraction <= 1) {
      const where = `${Number((sgdEdge / edge).toPrecision(3))} × the edge of GD`;
      said.push(
        state.eta < sgdEdge
          ? `With this sampling the mean gap stays bounded up to ${where}.`
          : `The mean gap explodes: with this sampling its own edge is at ${where}. A typical run may settle all the same.`,
      );
    }
    return said.join(" ");
  }

  // The step at which a run is out of the bowl, if it does not come back; else -1.
  function leaves(gaps) {
    return gaps[gaps.length - 1] <= FAR * gaps[0] ? -1 : explorer.divergedAt(gaps, FAR);
  }

  function digits(value) {
    if (!Number.isFinite(value)) return "beyond all numbers";
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return power(value);
    return String(Number(value.toPrecision(2)));
  }

  function power(value) {
    const [mantissa, exponent] = value.toExponential(0).split("e");
    const raised = [...String(Number(exponent))].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
    return mantissa === "1" ? `10${raised}` : `${mantissa}·10${raised}`;
  }

  function percent(share) {
    return share >= 0.001 ? `${Number((100 * share).toPrecision(2))} %` : `${digits(share)} times`;
  }

  // --- drawings --------------------------------------------------------------------------------------------------

  const MARGIN = { left: 52, right: 18, top: 10, bottom: 42 };
  const VIEW = { x: [-2.7, 1.7], y: [-1.7, 2.7] };

  function frameOf(svg, ranges, logarithmic) {
    const width = Math.max(240, svg.clientWidth);
    // The bowl's two axes have one scale.
    const square = width - MARGIN.left - MARGIN.right + MARGIN.top + MARGIN.bottom;
    const height = svg.id === "bowl" ? square : Math.max(300, Math.min(square, 460));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    const box = { x: MARGIN.left, y: MARGIN.top, w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
    const along = (range, v) => (v - range[0]) / (range[1] - range[0]);
    const x = (v) => box.x + box.w * along(ranges.x, v);
    const logs = ranges.y.map(Math.log10);
    const y = (v) => box.y + box.h * (1 - (logarithmic ? along(logs, Math.log10(Math.max(v, 1e-300))) : along(ranges.y, v)));
    return { box, x, y, width, height };
  }

  // Far outside is outside: browsers draw no coordinate of a million pixels.
  const near = (v) => (Number.isNaN(v) ? 1e5 : Math.max(-1e5, Math.min(1e5, v))).toFixed(1);

  function line(xs, ys, name) {
    let d = "";
    for (let k = 0; k < xs.length; k++) d += `${k ? "L" : "M"}${near(xs[k])} ${near(ys[k])}`;
    return `<path class="${name}" d="${d}"/>`;
  }

  function axes({ box, x, y, height }, xTicks, yTicks, xLabel, yLabel, grid) {
    const bottom = box.y + box.h;
    const parts = xTicks.map(([v, text]) => `<path class="tick" d="M${near(x(v))} ${bottom}v5"/><text x="${near(x(v))}" y="${bottom + 18}" text-anchor="middle">${text}</text>`);
    const [kind, length] = grid ? ["grid", box.w] : ["tick", -5];
    parts.push(...yTicks.map(([v, text]) => `<path class="${kind}" d="M${box.x} ${near(y(v))}h${length}"/><text x="${box.x - 6}" y="${Number(near(y(v))) + 4}" text-anchor="end">${text}</text>`));
    parts.push(`<path class="axis" d="M${box.x} ${box.y}V${bottom}H${box.x + box.w}"/>`);
    parts.push(`<text x="${box.x + box.w / 2}" y="${height - 6}" text-anchor="middle">${xLabel}</text>`);
    parts.push(`<text transform="translate(13 ${box.y + box.h / 2}) rotate(-90)" text-anchor="middle">${yLabel}</text>`);
    return parts.join("");
  }

  const clip = (id, box) => `<clipPath id="${id}"><rect x="${box.x}" y="${box.y}" width="${box.w}" height="${box.h}"/></clipPath>`;
  const cross = (x, y, name) => `<path class="cross ${name}" d="M${near(x - 5)} ${near(y - 5)}l10 10m0-10l-10 10"/>`;

  function draw(until) {
    drawBowl(until);
    drawCurve(until);
  }

  function drawBowl(until) {
    const svg = at("bowl");
    const frame = frameOf(svg, VIEW, false);
    const { x, y, box } = frame;
    const [u, v] = problem.minimiser;
    const [direction] = problem.directions;
    const parts = [];
    for (let level = 3 * startGap; level > startGap / 2000; level /= 3) {
      const [a, b] = problem.eigenvalues.map((lam) => Math.sqrt((2 * level) / lam));
      const points = Array.from({ length: 73 }, (_, k) => {
        const [p, q] = [a * Math.cos((k * Math.PI) / 36), b * Math.sin((k * Math.PI) / 36)];
        return [u + p * direction[0] - q * direction[1], v + p * direction[1] + q * direction[0]];
      });
      parts.push(line(points.map((p) => x(p[0])), points.map((p) => y(p[1])), "level"));
    }
    // A path that leaves for good is drawn until it is out, and marked where it was last seen in the picture.
    const end = (gaps) => (leaves(gaps) < 0 ? until : Math.min(until, leaves(gaps)));
    const track = (points, gaps, name) => {
      const xs = [];
      const ys = [];
      for (let t = 0; t <= end(gaps); t++) { xs.push(x(points[2 * t])); ys.push(y(points[2 * t + 1])); }
      return line(xs, ys, name);
    };
    state.runs.slice(0, SHOWN).forEach((run) => parts.push(track(run.points, run.gaps, "sgd")));
    parts.push(track(state.gd, state.gdGaps, "gd"));
    if (until <= 300) {
      for (let t = 0; t <= end(state.gdGaps); t++) parts.push(`<circle class="dot" r="1.8" cx="${near(x(state.gd[2 * t]))}" cy="${near(y(state.gd[2 * t + 1]))}"/>`);
    }
    const marks = [[state.gd, state.gdGaps, "gd"], ...state.runs.slice(0, SHOWN).map((run) => [run.points, run.gaps, "sgd"])];
    for (const [points, gaps, name] of marks) {
      const left = leaves(gaps);
      if (left < 0 || left > until) continue;
      for (let t = left; t >= 0; t--) {
        const [px, py] = [x(points[2 * t]), y(points[2 * t + 1])];
        if (px > box.x && px < box.x + box.w && py > box.y && py < box.y + box.h) { parts.push(cross(px, py, name)); break; }
      }
    }
    parts.push(`<circle class="start" r="5" cx="${near(x(given.start[0]))}" cy="${near(y(given.start[1]))}"/>`);
    parts.push(`<text class="name" x="${near(x(given.start[0]) - 2)}" y="${near(y(given.start[1]) - 10)}" text-anchor="middle">start</text>`);
    const ticks = [-2, -1, 0, 1, 2].map((t) => [t, String(t).replace("-", "−")]);
    const star = Array.from({ length: 10 }, (_, k) => {
      const r = k % 2 ? 3.6 : 9;
      return `${near(x(u) + r * Math.sin((k * Math.PI) / 5))},${near(y(v) - r * Math.cos((k * Math.PI) / 5))}`;
    });
    svg.innerHTML =
      clip("bowl-clip", box) +
      axes(frame, ticks.filter(([t]) => t < VIEW.x[1]), ticks.filter(([t]) => t > VIEW.y[0]),
        `w₁: weight of ${given.names[0]}`, `w₂: weight of ${given.names[1]}`, false) +
      `<g clip-path="url(#bowl-clip)">${parts.join("")}<polygon class="minimum" points="${star.join(" ")}"/></g>`;
    svg.setAttribute("aria-label", `The bowl: lines of equal loss over the two weights, and the paths from the start.`);
  }

  function drawCurve(until) {
    const svg = at("curve");
    const { gdGaps, exact, runs, band, steps } = state;
    const shown = runs.slice(0, SHOWN).map((run) => run.gaps);
    let lowest = startGap / 30;
    for (const curve of [gdGaps, exact, band && band.low]) {
      if (curve) for (const value of curve) if (value < lowest) lowest = value;
    }
    const bottom = 10 ** Math.floor(Math.log10(Math.max(lowest, startGap * 1e-8)));
    const top = 10 ** Math.ceil(Math.log10(startGap * FAR * (leaves(gdGaps) < 0 ? 1 : 1000)));
    const frame = frameOf(svg, { x: [0, steps], y: [bottom, top] }, true);
    const { x, y, box } = frame;
    const xs = Array.from({ length: until + 1 }, (_, t) => x(t));
    const curve = (values, name) => line(xs, Array.from(xs, (_, t) => y(values[t])), name);
    const parts = [];
    if (band) {
      const there = Array.from(xs, (px, t) => `${near(px)} ${near(y(band.high[t]))}`);
      const back = Array.from(xs, (px, t) => `${near(px)} ${near(y(band.low[t]))}`).reverse();
      parts.push(`<path class="band" d="M${[...there, ...back].join("L")}z"/>`);
    }
    shown.forEach((gaps) => parts.push(curve(gaps, "sgd")));
    parts.push(curve(gdGaps, "gd"));
    if (exact) parts.push(curve(exact, "exact"));
    const left = leaves(gdGaps);
    if (left >= 0 && left <= until) {
      const end = left > 0.6 * steps ? "end" : "start";
      parts.push(`<path class="moment" d="M${near(x(left))} ${box.y}v${box.h}"/>`);
      parts.push(`<text class="name" x="${near(x(left) + (end === "end" ? -6 : 6))}" y="${box.y + box.h - 10}" text-anchor="${end}">GD is out at step ${left}</text>`);
      parts.push(cross(x(left), y(gdGaps[left]), "gd"));
    }
    shown.forEach((gaps) => {
      const out = leaves(gaps);
      if (out >= 0 && out <= until) parts.push(cross(x(out), Math.max(box.y + 6, y(gaps[out])), "sgd"));
    });
    const decades = [];
    const apart = Math.ceil(Math.log10(top / bottom) / 7);
    for (let e = Math.round(Math.log10(top)); e >= Math.round(Math.log10(bottom)); e -= apart) {
      decades.push([10 ** e, e >= -2 && e <= 2 ? String(Number((10 ** e).toPrecision(1))) : power(10 ** e)]);
    }
    const xTicks = [0, 0.2, 0.4, 0.6, 0.8, 1].map((share) => [share * steps, String(Math.round(share * steps))]);
    svg.innerHTML =
      clip("curve-clip", box) +
      axes(frame, xTicks, decades, "steps (updates of the weights)", "gap: loss above its minimum", true) +
      `<g clip-path="url(#curve-clip)">${parts.join("")}</g>`;
  }

  // --- begin -----------------------------------------------------------------------------------------------------

  at("edge").textContent = digits(edge);
  at("explorer-form").addEventListener("input", () => begin(false));
  at("explorer-form").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("#explorer-form [data-eta]")) {
    button.addEventListener("click", () => {
      at("eta").value = button.dataset.eta;
      at("batch").value = button.dataset.batch;
      at("steps").value = button.dataset.steps || "200";
      document.querySelector(`input[name="sampling"][value="${button.dataset.sampling}"]`).checked = true;
      begin(MOTION);
    });
  }
  at("run").addEventListener("click", () => begin(MOTION));
  at("seeds").addEventListener("click", () => { firstSeed += 1000; begin(false); });
  new ResizeObserver(() => state && draw(state.steps)).observe(at("explorer"));
  at("explorer").hidden = false;
  begin(false);
})();
