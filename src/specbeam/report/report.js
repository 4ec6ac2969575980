// Draws the token and beam views, and makes tabs of several runs; everything else on this page is plain HTML. Text enters
// the page by textContent only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, css, text) => {
    const element = document.createElement(tag);
    if (css) element.className = css;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const shape = (tag, css, attributes, text) => {
    const element = document.createElementNS(SVG, tag);
    element.setAttribute("class", css);
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const chooser = (names, label, chosen) => {
    const select = make("select");
    select.setAttribute("aria-label", label);
    names.forEach((name, i) => select.append(Object.assign(make("option", "", name), { value: i })));
    select.addEventListener("change", () => chosen(Number(select.value)));
    return select;
  };
  const checkbox = (text, checked, changed) => {
    const label = make("label");
    const box = Object.assign(make("input"), { type: "checkbox", checked });
    box.addEventListener("change", () => changed(box.checked));
    label.append(box, ` ${text}`);
    return label;
  };
  const short = (text) => text.replace(/\s+/g, " ").slice(0, 80);

  // One tip for all that has data-tip.
  const tip = make("div", "tip");
  tip.hidden = true;
  document.body.append(tip);
  const show = (event) => {
    const from = event.target.closest("[data-tip]");
    tip.hidden = !from;
    document.querySelectorAll(".same").forEach((one) => one.classList.remove("same"));
    if (!from) return;
    tip.textContent = from.dataset.tip;
    if (from.dataset.round) {
      from.parentElement.querySelectorAll(`[data-round="${from.dataset.round}"]`).forEach((one) => one.classList.add("same"));
    }
    const box = from.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${scrollX + Math.max(8, left)}px`;
    tip.style.top = `${scrollY + (above < 4 ? box.bottom + 6 : above)}px`;
  };
  const withTips = (view) => {
    view.addEventListener("mouseover", show);
    view.addEventListener("focusin", show);
    view.addEventListener("mouseleave", () => { tip.hidden = true; });
  };

  // Tokens
  const SOURCES = { d: "drafted, accepted", c: "the target's correction", b: "bonus token", p: "decoded plainly" };
  const percent = (values, i) => (values && values[i] !== null && values[i] !== undefined ? `${values[i]} %` : null);
  const describe = ([drafted, accepted, milliseconds, , tree, why]) => (drafted === 0 ? "nothing proposed"
    : tree ? `a path of ${accepted} accepted in a tree of ${drafted} nodes` : `${accepted} of ${drafted} proposals accepted`)
    + `, ${milliseconds} ms` + (why && why !== "length" ? `\nproposal ended by: ${why}` : "");
  const times = (answer) => (answer.steps ? answer.steps.map((one) => one[2]) : answer.milliseconds);
  const sum = (values) => values.reduce((total, one) => total + one, 0);

  function tokenView(view, own) {
    const source = (letter) => SOURCES[letter] || `proposed by ${own.sources[letter]}, accepted`;

    function tokens(answer) {
      const line = make("p");
      line.dir = "auto";
      let round = null;
      answer.pieces.forEach((piece, i) => {
        const letter = answer.sources[i];
        const now = answer.rounds[i];
        const step = now > 0 ? answer.steps[now - 1] : null;
        if (step && letter === "c") {
          step[3].forEach((piece) => {
            const rejected = make("span", step[4] ? "t x w" : "t x", piece);
            rejected.dataset.tip = `proposed in round ${now}${step[4] ? " for this place" : ""}, rejected`;
            line.append(rejected);
          });
        }
        const token = make("span", `t ${letter}${now !== round && i > 0 ? " n" : ""}`, piece);
        const lines = [`token ${i + 1}: ${source(letter)}, ${now === 0 ? "prefill" : `round ${now}`}`];
        if (step) lines.push(describe(step));
        if (percent(answer.target, i)) lines.push(`target's probability ${percent(answer.target, i)}`);
        if (percent(answer.draft, i)) lines.push(`draft's probability ${percent(answer.draft, i)}`);
        token.dataset.tip = lines.join("\n");
        token.dataset.round = now;
        line.append(token);
        round = now;
      });
      return line;
    }

    function lane(answer, longest) {
      const whole = new Set(answer.rounds.filter((_, i) => answer.sources[i] === "b"));
      const bar = make("div", "timeline");
      bar.style.width = `${Math.max(1, (100 * sum(times(answer))) / longest)}%`;
      times(answer).forEach((milliseconds, i) => {
        const step = answer.steps && answer.steps[i];
        const part = make("span", step && step[0] ? (step[1] === 0 ? "k0" : step[1] === step[0] || whole.has(i + 1) ? "k2" : "k1") : "");
        part.style.flex = `${Math.max(milliseconds, 0.001)} 1 0`;
        part.dataset.tip = step ? `round ${i + 1}: ${describe(step)}` : `step ${i + 1}: ${milliseconds} ms`;
        bar.append(part);
      });
      const track = make("div");
      track.append(bar);
      return [make("b", "", answer.method), track, make("small", "", `${sum(times(answer)).toFixed(0)} ms, ` +
        `${times(answer).length} ${answer.steps ? "rounds" : "steps"}`)];
    }

    function draw(prompt) {
      body.replaceChildren();
      const asked = make("p", "prompt", prompt.prompt);
      asked.dir = "auto";
      const lanes = make("div", "lanes");
      const longest = Math.max(...prompt.answers.map((answer) => sum(times(answer))), 0.001);
      prompt.answers.forEach((answer) => lanes.append(...lane(answer, longest)));
      body.append(asked, lanes);
      prompt.answers.filter((answer) => answer.steps).forEach((answer) => {
        const block = make("div", "answer-tokens");
        block.append(make("h4", "", answer.method), tokens(answer));
        body.append(block);
      });
    }

    const controls = make("div", "controls");
    controls.append(
      chooser(own.prompts.map((prompt) => `${prompt.name}: ${short(prompt.prompt)}`), "prompt", (i) => draw(own.prompts[i])),
      checkbox("show rejected proposals", true, (on) => view.classList.toggle("hide-rejected", !on)));
    if (own.left_out) controls.append(make("small", "", `${own.left_out} more prompts are in trace.jsonl`));
    const body = make("div");
    view.append(controls, body);
    withTips(view);
    draw(own.prompts[0]);
  }

  // Beams
  const ENDINGS = { eos: "an end token", stop: "a stop string", length: "the length limit" };
  const CELL = 92;
  const ROW = 23;

  function placed(answer) {
    // Candidates with their parents and fates: per step a list, and for each beam who stands on it.
    const steps = [];
    let beams = [];
    answer.steps.forEach(([pieces, origins, scores, survived, reasons, finished], number) => {
      const now = [];
      steps.push(pieces.map((piece, i) => {
        const parent = number ? beams[origins[i]] : null;
        const own = { piece, step: number, score: scores[i], survived: survived[i], reason: reasons[i], pool: finished[i],
          parent, beam: origins[i], fate: survived[i] !== null ? "dead" : finished[i] !== null ? "fin" : "lost", rank: null };
        if (survived[i] !== null) now[survived[i]] = own;
        return own;
      }));
      beams = now;
    });
    answer.ends.forEach(([step, number], rank) => {
      let node = steps[step][number];
      node.rank = rank;
      for (; node; node = node.parent) if (node.fate !== "win" && node.fate !== "alive") node.fate = rank ? "alive" : "win";
    });
    return steps;
  }

  function told(node, answer) {
    const alone = node.parent && node.parent.score !== null && node.score !== null ? node.score - node.parent.score : null;
    const lines = [`“${node.piece}”, step ${node.step + 1}` + (node.step ? `, continues beam ${node.beam + 1}` : "")];
    lines.push(`summed log-probability ${node.score === null ? "–" : node.score.toFixed(2)}` +
      (alone === null ? "" : `, this token ${alone.toFixed(2)}`));
    if (node.survived !== null) lines.push(`ran on as beam ${node.survived + 1}` + (node.fate === "dead" ? ", dropped later" : ""));
    if (node.reason) lines.push(`ended by ${ENDINGS[node.reason] || node.reason}` + (node.pool === null ? ", not kept"
      : `, score ${node.pool}` + (node.rank === null ? ", overtaken later" : `: number ${node.rank + 1} of ${answer.ends.length}`)));
    if (node.survived === null && !node.reason) lines.push("lost: not among the best");
    answer.methods.forEach(([method, rounds]) => lines.push(`${method}: ${rounds[node.step] ? `round ${rounds[node.step]}` : "prefill"}`));
    return lines.join("\n");
  }

  function band(answer, steps, from, to, losers) {
    const rows = steps.slice(from, to).map((step) => [
      ...step.filter((one) => one.survived !== null).sort((a, b) => a.survived - b.survived),
      ...step.filter((one) => one.survived === null && one.pool !== null),
      ...(losers ? step.filter((one) => one.survived === null && one.pool === null) : [])]);
    const most = Math.max(...rows.map((row) => row.length));
    const [width, height] = [(to - from) * CELL + 30, most * ROW + 22];
    const svg = shape("svg", "beam-band", { viewBox: `0 0 ${width} ${height}`, width, role: "img", "aria-label": `steps ${from + 1} to ${to}` });
    const at = new Map();
    if (from) steps[from - 1].forEach((one) => { if (one.survived !== null) at.set(one, [-CELL + 26, 20 + one.survived * ROW]); });
    rows.forEach((row, i) => row.forEach((one, j) => at.set(one, [26 + i * CELL, 20 + j * ROW])));
    const edges = shape("g", "edges", {});
    const nodes = shape("g", "nodes", {});
    rows.forEach((row, i) => {
      svg.append(shape("text", "tick", { x: 26 + i * CELL, y: 10 }, String(from + i + 1)));
      row.forEach((one) => {
        const [x, y] = at.get(one);
        const css = `${one.fate}${one.rank !== null || one.pool !== null ? " over" : ""}`;
        if (one.parent && at.has(one.parent)) {
          const [px, py] = at.get(one.parent);
          const start = Math.max(px + CELL - 20, 2);
          edges.append(shape("path", css, { d: `M${start} ${py + 9}C${start + 8} ${py + 9} ${x - 8} ${y + 9} ${x} ${y + 9}` }));
        }
        const node = shape("g", css, {});
        node.dataset.tip = told(one, answer);
        const mark = one.pool === null ? "" : "■ ";
        const text = mark + (one.piece.trim() || "␣");
        node.append(shape("rect", "", { x, y, width: CELL - 20, height: 18, rx: 4 }),
          shape("text", "", { x: x + 5, y: y + 13 }, text.length > 11 ? `${text.slice(0, 10)}…` : text));
        nodes.append(node);
      });
    });
    svg.append(edges, nodes);
    // steps that one round of speculation took together
    answer.methods.filter(([, rounds]) => new Set(rounds).size < rounds.length).slice(0, 1).forEach(([method, rounds]) => {
      for (let i = from; i < to; i += 1) {
        if (i > from && rounds[i] === rounds[i - 1]) continue;
        let end = i;
        while (end + 1 < to && rounds[end + 1] === rounds[i]) end += 1;
        if (end === i) continue;
        const line = shape("line", "round", { x1: 26 + (i - from) * CELL, x2: 6 + (end - from + 1) * CELL, y1: 15, y2: 15 });
        line.dataset.tip = `${method}: ${rounds[i] ? `round ${rounds[i]}` : "prefill"}, ${rounds.filter((one) => one === rounds[i]).length} steps`;
        svg.append(line);
      }
    });
    return svg;
  }

  function beamView(view, own) {
    let shown = 0;
    let losers = false;
    function draw() {
      const answer = own.answers[shown];
      body.replaceChildren();
      const asked = make("p", "prompt", answer.prompt);
      asked.dir = "auto";
      body.append(asked, make("p", "notes", `Searched by ${answer.methods.map(([method]) => method).join(" and ")}` +
        `, ${answer.steps.length} steps.` + (answer.methods.some(([, rounds]) => new Set(rounds).size < rounds.length)
        ? " Lines above the columns: steps that one round of speculation took together." : "")));
      const steps = placed(answer);
      const fit = Math.max(3, Math.floor(((view.clientWidth || 1070) - 30) / CELL));
      for (let from = 0; from < steps.length; from += fit) body.append(band(answer, steps, from, Math.min(steps.length, from + fit), losers));
      const table = make("table", "hypotheses");
      answer.ends.forEach(([step, , score, reason, text], rank) => {
        const row = make("tr", rank ? "" : "win");
        const said = make("td", "", text);
        said.dir = "auto";
        row.append(make("th", "", `${rank + 1}`), make("td", "", score === null ? "–" : score.toFixed(4)),
          make("td", "", `${step + 1} tokens, ${ENDINGS[reason] || reason}` + (rank < answer.returned ? "" : ", not returned")), said);
        table.append(row);
      });
      const wide = make("div", "wide");
      wide.append(table);
      body.append(wide);
    }
    const controls = make("div", "controls");
    controls.append(
      chooser(own.answers.map((one) => `${one.name} (${one.methods.map(([method]) => method).join(", ")}): ${short(one.prompt)}`),
        "search tree", (i) => { shown = i; draw(); }),
      checkbox("show losers", false, (on) => { losers = on; draw(); }));
    if (own.left_out) controls.append(make("small", "", `${own.left_out} more search trees are in beams.jsonl`));
    const body = make("div");
    view.append(controls, body);
    withTips(view);
    draw();
  }

  const views = () => {
    document.querySelectorAll(".token-view:empty").forEach((view) => {
      const own = data.runs[view.dataset.run].tokens;
      if (own.prompts.length && view.offsetParent) tokenView(view, own);
    });
    document.querySelectorAll(".beam-view:empty").forEach((view) => {
      const own = data.runs[view.dataset.run].beams;
      if (own.answers.length && view.offsetParent) beamView(view, own);
    });
  };

  // Several runs: one at a time, chosen by tabs; all of them on paper.
  const tabs = [...document.querySelectorAll(".tabs a")];
  const runs = [...document.querySelectorAll(".run")];
  let chosen = 0;
  const choose = (number) => {
    chosen = number;
    tabs.forEach((tab, i) => tab.setAttribute("aria-selected", i === number));
    runs.forEach((run, i) => run.classList.toggle("hidden", i !== number));
    views();
  };
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((one) => { one.open = true; });
    runs.forEach((run) => run.classList.remove("hidden"));
    views();
  });
  addEventListener("afterprint", () => { if (tabs.length) choose(chosen); });
  if (tabs.length) {
    document.querySelector(".tabs").setAttribute("role", "tablist");
    tabs.forEach((tab, i) => {
      tab.setAttribute("role", "tab");
      tab.addEventListener("click", (event) => { event.preventDefault(); choose(i); });
    });
    choose(0);
  } else {
    views();
  }
})();
