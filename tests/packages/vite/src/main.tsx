import { StrictMode } from "react";
import { createRoot } from "react-dom/client";

import { Inbox } from "./inbox";

const query = new URLSearchParams(location.search);

createRoot(document.querySelector("#root")!).render(
  <StrictMode>
    <Inbox url={query.get("url") ?? ""} token={query.get("token") ?? ""} />
  </StrictMode>,
);
