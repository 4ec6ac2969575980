// Draws the token view; everything else on this page is plain HTML. Text enters the page by textContent only.
(() => {
  const view = document.getElementById("token-view");
  const data = JSON.parse(document.getElementById("data").textContent);
  const SOURCES = { d: "drafted, accepted", c: "the target's correction", b: "bonus token", p: "decoded plainly" };
  const source = (letter) => SOURCES[letter] || `proposed by ${data.sources[letter]}, accepted`;

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
  if (!view || !data.prompts.length) return;

  const make = (tag, css, text) => {
    const element = document.createElement(tag);
    if (css) element.className = css;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const tip = make("div", "tip");
  tip.hidden = true;
  document.body.append(tip);
  const show = (event) => {
    const from = event.target.closest("[data-tip]");
    tip.hidden = !from;
    view.querySelectorAll(".same").forEach((one) => one.classList.remove("same"));
    if (!from) return;
    tip.textContent = from.dataset.tip;
    if (from.dataset.round) {
      from.parentElement.querySelectorAll(`[data-round="${from.dataset.round}"]`).forEach((one) => one.classList.add("same"));
    }
    const box = from.getBoundingClientRect();
    const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${scrollX + Math.max(8, left)}px`;
    tip.style.top = `${scrollY + (above < 4 ? box.bottom + 6 : above)}px`;
  };
  view.addEventListener("mouseover", show);
  view.addEventListener("focusin", show);
  view.addEventListener("mouseleave", () => { tip.hidden = true; });

  const percent = (values, i) => (values && values[i] !== null && values[i] !== undefined ? `${values[i]} %` : null);

  const describe = ([drafted, accepted, milliseconds, , tree, why]) => (drafted === 0 ? "nothing proposed"
    : tree ? `a path of ${accepted} accepted in a tree of ${drafted} nodes` : `${accepted} of ${drafted} proposals accepted`)
    + `, ${milliseconds} ms` + (why && why !== "length" ? `\nproposal ended by: ${why}` : "");

  function tokens(answer) {
    const line = make("p");
    line.dir = "auto";
    let round = null;
    answer.pieces.forEach((piece, i) => {
      const letter = answer.sources[i];
      const now = answer.rounds[i];
      const step = answer.steps && now > 0 ? answer.steps[now - 1] : null;
      if (step && letter === "c") {
        step[3].forEach((piece) => {
          const rejected = make("span", step[4] ? "t x w" : "t x", piece);
          rejected.dataset.tip = `proposed in round ${now}${step[4] ? " for this place" : ""}, rejected`;
          line.append(rejected);
        });
      }
      const starts = answer.steps && now !== round && i > 0;
      const token = make("span", `t ${letter}${starts ? " n" : ""}`, piece);
      const where = now === 0 ? "prefill" : `round ${now}`;
      const lines = [`token ${i + 1}: ${source(letter)}, ${where}`];
      if (step) lines.push(describe(step));
      if (percent(answer.target, i)) lines.push(`target's probability ${percent(answer.target, i)}`);
      if (percent(answer.draft, i)) lines.push(`draft's probability ${percent(answer.draft, i)}`);
      token.dataset.tip = lines.join("\n");
      if (answer.steps) token.dataset.round = now;
      line.append(token);
      round = now;
    });
    return line;
  }

  function timeline(answer, longest) {
    const steps = answer.steps ? answer.steps.map((one) => one[2]) : answer.milliseconds;
    const total = steps.reduce((sum, one) => sum + one, 0);
    const whole = new Set(answer.rounds.filter((_, i) => answer.sources[i] === "b"));
    const bar = make("div", "timeline");
    bar.style.width = `${Math.max(1, (100 * total) / longest)}%`;
    steps.forEach((milliseconds, i) => {
      const step = answer.steps && answer.steps[i];
      const part = make("span", step && step[0] ? (step[1] === 0 ? "k0" : step[1] === step[0] || whole.has(i + 1) ? "k2" : "k1") : "");
      part.style.flex = `${Math.max(milliseconds, 0.001)} 1 0`;
      part.dataset.tip = step ? `round ${i + 1}: ${describe(step)}`
        : `step ${i + 1}: ${milliseconds} ms`;
      bar.append(part);
    });
    return [bar, total, steps.length];
  }

  function draw(prompt) {
    body.replaceChildren();
    const asked = make("p", "prompt", prompt.prompt);
    asked.dir = "auto";
    body.append(asked);
    const total = (answer) => (answer.steps ? answer.steps.map((one) => one[2]) : answer.milliseconds)
      .reduce((sum, one) => sum + one, 0);
    const longest = Math.max(...prompt.answers.map(total), 0.001);
    prompt.answers.forEach((answer) => {
      const block = make("div", "answer-tokens");
      const [bar, time, count] = timeline(answer, longest);
      block.append(make("h4", "", answer.method));
      if (answer.steps) block.append(tokens(answer));
      block.append(bar, make("small", "", `${answer.pieces.length} tokens, ${count} ${answer.steps ? "rounds" : "steps"} in ` +
        `${time.toFixed(0)} ms of decoding` + (answer.steps ? "" : "; one token a step")));
      body.append(block);
    });
  }

  const controls = make("div", "controls");
  const choice = make("select");
  choice.setAttribute("aria-label", "prompt");
  data.prompts.forEach((prompt, i) => {
    const short = prompt.prompt.replace(/\s+/g, " ").slice(0, 80);
    choice.append(Object.assign(make("option", "", `${prompt.name}: ${short}`), { value: i }));
  });
  const label = make("label");
  const box = Object.assign(make("input"), { type: "checkbox", checked: true });
  label.append(box, " show rejected proposals");
  box.addEventListener("change", () => view.classList.toggle("hide-rejected", !box.checked));
  choice.addEventListener("change", () => draw(data.prompts[choice.value]));
  controls.append(choice, label);
  if (data.left_out) controls.append(make("small", "", `${data.left_out} more prompts are in trace.jsonl`));
  const body = make("div");
  view.append(controls, body);
  draw(data.prompts[0]);
})();
